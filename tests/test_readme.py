# SPDX-License-Identifier: Apache-2.0
"""The README: short, its status first, its links and its picture made of what is in the repository."""

from __future__ import annotations

import importlib.util
import re

import pytest

from benchmarks import speed
from tests.documents import PAGES, ROOT
from vitkern.bench import store

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")

_spec = importlib.util.spec_from_file_location("address", ROOT / "tools" / "address.py")
address = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(address)


def test_it_is_short_and_the_status_is_in_the_first_screen():
    assert len(README.splitlines()) < 120
    first = "\n".join(README.splitlines()[:14])
    assert "measured" in first and "not yet run on a card" in first and "docs/speed.svg" in first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    relative = [target for target in targets if target and not re.match(r"https?:|mailto:", target)]
    assert [target for target in relative if not (page.parent / target).exists()] == []


def test_what_commands_take_is_said_where_they_are():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (demo,) = re.findall(r"^demo: .*## (.*)", makefile, re.MULTILINE)
    (test,) = re.findall(r"^test: .*## (.*)", makefile, re.MULTILINE)
    for text in (demo, test, README):
        assert re.search(r"\d+ (minutes|on two cores)", text) and re.search(r"\d+ GB", text)


def test_the_picture_is_made_of_the_committed_file():
    record = store.read(speed.RESULTS)
    drawn = speed.PICTURE.read_text(encoding="utf-8")
    assert drawn == speed.draw(record)
    environment = record["environment"]
    for named in (
        environment["cpu"]["model"],
        environment["torch"]["version"],
        environment["commit"]["id"][:10],
    ):
        assert named in drawn
    assert f"{environment['cpu']['threads']} threads" in drawn
    assert "prefers-color-scheme:dark" in drawn


def test_all_that_the_picture_may_show_is_measured():
    """An op or a case of another name would be left out in silence."""
    lines = dict(speed.ratios(store.read(speed.RESULTS)))
    assert list(lines) == [words for _, _, words in speed.SHOWN]
    assert all(list(found) == list(speed.PASSES) for found in lines.values())


def test_what_failed_its_check_is_not_drawn():
    record = store.read(speed.RESULTS)
    op, case, words = speed.SHOWN[0]
    for row in record["rows"]:
        if (row["op"], row["case"], row["backend"]) == (op, case, "cpu"):
            row["verified"] = False
    assert words not in dict(speed.ratios(record)) and words not in speed.draw(record)


@pytest.mark.parametrize("name", address.FILES)
def test_files_are_made_of_the_one_address(name):
    change, text = address.FILES[name], (ROOT / name).read_text(encoding="utf-8")
    assert change(text, address.ADDRESS) == text
    elsewhere = change(text, "https://example.org/o/vitkern")
    assert "https://example.org/o/vitkern" in elsewhere
    assert change(elsewhere, "https://example.org/o/vitkern") == elsewhere
    assert change(elsewhere, "") == change(text, "")


def test_without_an_address_nothing_asks_for_one():
    assert "http" not in address.readme(README, "")
    links = LINK.findall(address.readme(README, "https://example.org/o/vitkern"))
    assert [link for link in links if not link.startswith("https://example.org/o/vitkern/")] == []
