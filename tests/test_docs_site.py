# SPDX-License-Identifier: Apache-2.0
"""The site that `make docs` builds: no warnings, no dead links, no resources from other sites."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import complaints, needs_browser
from tests.documents import ROOT

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
PUBLIC = ("vitkern", "vitkern.nn", "vitkern.models", "vitkern.onnx")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("site"),
    pytest.mark.skipif(not MKDOCS.exists(), reason="no .venv-docs/bin/mkdocs: `make docs` makes it"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [MKDOCS, "build", "--quiet", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """A parser that collects the addresses a page loads, its anchors, and its words outside of code and formulas."""

    LOADING = ("src", "srcset", "data", "poster", "action")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.anchors.add(given.get("id", ""))
        self.loads += [given[name] for name in self.LOADING if name in given]
        if tag == "link":
            self.loads.append(given.get("href", ""))
        if tag in ("code", "pre", "script", "style", "annotation"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.words.append(data)


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        text = path.read_text()
        outside = [load for load in Page(text).loads if re.match(r"(https?:)?//", load)]
        assert not outside, f"{path.relative_to(site)} loads {outside}"
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", text), path
    for path in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", path.read_text()), path


def test_formulas_are_mathml(site):
    counts = {}
    for path in (site / "derivations").glob("*.html"):
        text = path.read_text()
        words = "".join(Page(text).words)
        assert not re.search(r"\\[a-zA-Z]+|\$\$|arithmatex", words), path.name
        assert "<merror" not in text
        counts[path.stem] = text.count("<math ")
    assert len(counts) == 4
    assert min(counts.values()) > 5
    assert 'id="eq-7"' in (site / "derivations" / "ms_deform_attn.html").read_text()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_explained(site, module):
    anchors = set().union(*(Page(path.read_text()).anchors for path in (site / "api").glob("*.html")))
    names = [
        name
        for name in importlib.import_module(module).__all__
        if name not in ("__version__", "models", "nn")
    ]
    for name in names:
        homes = {f"{home}.{name}" for home in PUBLIC} | {f"vitkern.models.{name}.{name}"}
        assert anchors & homes, f"{module}.{name} is on no page of docs/api"


def test_commands_print_their_help(site):
    text = (site / "api" / "commands.html").read_text()
    for command in ("doctor", "demo", "models", "run", "check", "bench run", "bench compare", "bench report"):
        assert f"usage: vitkern {command}" in text


def test_pages_of_the_root_lead_to_pages(site):
    links = re.findall(r'href="([^"]*\.md[^"]*)"', "".join(path.read_text() for path in site.glob("*.html")))
    assert links == []


@needs_browser
@pytest.mark.parametrize("page", ["index.html", "derivations/ms_deform_attn.html", "api/ops.html"])
def test_a_browser_shows_it_without_complaint(site, page, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = complaints(f"http://127.0.0.1:{server.server_port}/{page}", tmp_path / "page.png")
        server.shutdown()
    assert said == []


@needs_browser
def test_complaints_are_noticed(site, tmp_path):
    broken = site / "broken.html"
    broken.write_text(
        (site / "index.html").read_text().replace("</body>", "<script>absent()</script></body>")
    )
    (said,) = complaints(broken.as_uri(), tmp_path / "page.png")
    broken.unlink()
    assert "absent is not defined" in said


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
