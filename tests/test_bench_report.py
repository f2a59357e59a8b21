# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench report`: a self-contained page, and Markdown with pictures beside it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench_records import record, row
from tests.browser import complaints, needs_browser
from vitkern.bench import report, store
from vitkern.bench.svg import Log, number
from vitkern.cli import main


@pytest.fixture
def written(tmp_path) -> Path:
    """A record of two ops with speed-ups, a failed row and a name that must be escaped."""
    rows = [
        row(case, op=op, backend=backend, dtype=dtype, what=what, slower=slower)
        for op in ("token_pool", "<b>adapter</b>")
        for case in ("vt-64", "vt-3136", "vt-resnet18")
        for dtype in ("float32", "bfloat16")
        for what in ("forward", "backward")
        for backend, slower in (("cpu", 1.0), ("torch", 4.0))
    ]
    rows.append(row("vt-fpn", reason="output is off by 3e-01 & more"))
    path = tmp_path / "out.json"
    store.write(path, record(*rows, status="interrupted"))
    assert main(["bench", "report", str(path)]) == 0
    return tmp_path


class Page(HTMLParser):
    """A parser that collects the addresses a page loads and checks that its elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(written):
    text = (written / "out.html").read_text()
    page = Page(text)
    assert page.loads == ["data:,"]  # no icon, so that a browser does not ask for one
    assert not re.search(r"https?://|@import|url\(|//cdn", text)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert page.open == []
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_the_page_has_plots_of_each_kind_and_all_rows(written):
    text = (written / "out.html").read_text()
    titles = re.findall(r"<svg[^>]*><title>([^<]*)", text)
    assert sum("Speed-up" in title for title in titles) == 4  # ops x dtypes
    assert sum("Time against size" in title for title in titles) == 4  # ops x passes
    assert "Roofline" in titles
    assert text.count("<tr") == 1 + len(store.read(written / "out.json")["rows"])


def test_what_figures_are_is_told(written):
    page, text = ((written / name).read_text() for name in ("out.html", "out.md"))
    assert "<th>least ms</th>" in page
    assert "<th>error / largest</th>" in page
    assert "| least ms |" in text
    assert "so marks may lie above the 16-bit line." in text
    assert "pale: backward, or both passes (a training step in one call)" in page
    assert "<th>median ms</th>" in report.page(record(row() | {"device": "cuda"}))


def test_legends_name_what_is_drawn(written):
    """Plain torch has no bars: each bar is a speed-up over it."""
    legends = re.findall(r'<div class="legend">(.*?)</div>', (written / "out.html").read_text())
    assert ["plain torch" in legend for legend in legends] == [False, True]
    assert all(">cpu</span>" in legend.replace("</i>", ">") for legend in legends)


def test_failures_and_interruptions_are_told_and_have_no_figures(written):
    for name in ("out.html", "out.md"):
        text = (written / name).read_text()
        assert "1 rows FAILED their check" in text
        assert "not finished (interrupted)" in text
        (line,) = [line for line in re.split(r"<tr|\n", text) if "vt-fpn" in line]
        assert "FAILED: output is off" in line
        assert not re.search(r"\d\.\d\d\d|%", line.partition("FAILED")[0])


def test_names_are_escaped(written):
    text = (written / "out.html").read_text()
    assert "<b>adapter" not in text
    assert "&lt;b&gt;adapter" in text


EVIL = "<img src=x onerror=alert(1)>|a ![b](//c) `d` \\| e"


def test_no_text_of_a_file_is_more_than_text(tmp_path):
    """Names from a file are escaped everywhere: in tables, tiles, averages, legends, pictures and at the head."""
    names = ("op", "case", "device", "dtype", "backend", "pass", "bound", "anchor")
    for name in names:
        rows = [row(backend=b) | {"device": "cpu", name: EVIL} for b in ("cpu", "torch")]
        if name == "backend":
            rows[1] |= {"backend": "torch"}
        _assert_harmless(record(*rows), tmp_path)
    words = f"{EVIL}\n\n# heading\n\x1b[31mred\x00"
    found = record(row(), row(backend="torch"), row("vt-fpn", reason=words))
    found["command"], found["started"] = [words], words
    found["environment"]["cpu"]["model"] = found["environment"]["torch"]["version"] = words
    found["ceilings"]["product"] |= {EVIL: 1.0}
    _assert_harmless(found, tmp_path)


def _assert_harmless(found, folder):
    path = folder / "out.json"
    store.write(path, found)
    assert main(["bench", "report", str(path)]) == 0
    for picture in folder.glob("*.svg"):
        assert not {"img", "script"} & {tag.rpartition("}")[2] for tag in _tags(picture)}
    page = Page((folder / "out.html").read_text())
    assert not {"img", "script"} & set(page.tags)
    assert page.open == []
    lines = (folder / "out.md").read_text().splitlines()
    assert not any("<" in line or "![b]" in line or "\x1b" in line or "\x00" in line for line in lines)
    assert sum(line.startswith("#") for line in lines) == 1
    columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines if line.startswith("|")}
    assert columns == {5, 14}


def _tags(picture):
    return [element.tag for element in ElementTree.fromstring(picture.read_text()).iter()]


def test_markdown_shows_pictures_that_are_there_and_parse(written):
    text = (written / "out.md").read_text()
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(names) == 9
    for name in names:
        root = ElementTree.fromstring((written / name).read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    table = [line for line in text.splitlines() if line.startswith("| token_pool | vt")]
    assert {line.count("|") for line in table} == {14}


def test_one_of_the_two_can_be_asked_for(written, tmp_path, capsys):
    target = tmp_path / "elsewhere" / "page.html"
    assert main(["bench", "report", str(written / "out.json"), "-o", str(target)]) == 0
    assert target.exists()
    assert not target.with_suffix(".md").exists()
    assert main(["bench", "report", str(written / "out.json"), "-o", "page.pdf"]) == 2
    assert "ends in .html or .md" in capsys.readouterr().err


def test_what_others_held_up_is_in_no_average_and_no_plot(tmp_path):
    rows = [
        row(case, backend=backend, slower=slower, anchor=anchor)
        for case, anchor, speed in (("vt-64", 1.0, 4.0), ("vt-3136", 20.0, 40.0))
        for backend, slower in (("cpu", 1.0), ("torch", speed))
    ]
    path = tmp_path / "out.json"
    store.write(path, record(*rows))
    assert main(["bench", "report", str(path)]) == 0
    for name in ("out.html", "out.md"):
        text = (tmp_path / name).read_text()
        assert "2 rows were held up by other work" in text
        assert "40.00x" not in text
        held = [line for line in re.split(r"<tr|\n", text) if "vt-3136 x1" in line and "held up" in line]
        assert len(held) == 2
    assert "vt-3136" not in "".join(drawn.read_text() for drawn in tmp_path.glob("*.svg"))
    assert "| token_pool | cpu | fp32 | 4.00x |" in (tmp_path / "out.md").read_text()


def test_a_report_that_cannot_be_written_is_told(written, capsys):
    for name in ("page.html", "page.md"):
        assert (
            main(["bench", "report", str(written / "out.json"), "-o", str(written / "out.json" / name)]) == 2
        )
        assert f"cannot write {written / 'out.json' / name}: " in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [row(reason="wrong")], [row()]])
def test_runs_with_little_in_them_have_a_page_too(rows, tmp_path):
    path = tmp_path / "out.json"
    store.write(path, record(*rows) | ({"ceilings": None} if not rows else {}))
    assert main(["bench", "report", str(path)]) == 0
    assert Page(path.with_suffix(".html").read_text()).open == []


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_it_without_complaint(written):
    assert complaints((written / "out.html").as_uri(), written / "page.png") == []


@pytest.mark.slow
@needs_browser
def test_the_table_fits_a_window_of_1400_pixels(tmp_path):
    path = tmp_path / "out.json"
    figures = {"gb_per_s": 123.45, "gflop_per_s": 1234.56, "share": 0.123, "bound": "arithmetic"}
    found = row("adaptformer-video", op="ms_deform_attn_fused", dtype="bfloat16", what="backward")
    store.write(path, record(found | figures | {"peak_bytes": 1234 * 2**20}))
    assert main(["bench", "report", str(path)]) == 0
    page = path.with_suffix(".html")
    told = (
        "const e = document.querySelector('.table'); console.log(`hidden ${e.scrollWidth - e.clientWidth}`)"
    )
    page.write_text(page.read_text().replace("</body>", f"<script>{told}</script></body>"))
    (said,) = complaints(page.as_uri(), tmp_path / "page.png")
    assert "hidden 0" in said


def test_axes_have_round_numbers_and_few():
    axis = Log.over([0.031, 47.0], 0, 100)
    assert axis(axis.low) == pytest.approx(0)
    assert axis(axis.high) == pytest.approx(100)
    assert axis.ticks(4) == pytest.approx([0.1, 1, 10])
    assert [number(value) for value in (0.5, 12, 3400, 2e6, 999_999)] == ["0.5", "12", "3.4k", "2M", "1M"]
