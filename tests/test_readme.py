# SPDX-License-Identifier: Apache-2.0
"""The README is short and begins with the status; its links lead to files, its picture matches the committed record."""

from __future__ import annotations

import importlib.util
import re
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import speed
from tests import bench_records
from tests.documents import PAGES, ROOT
from vitkern.bench import store
from vitkern.cases import ADAPTER_CASES, ATTENTION_CASES, TOKEN_CASES
from vitkern.cli import make_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")

_spec = importlib.util.spec_from_file_location("address", ROOT / "tools" / "address.py")
address = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(address)


def test_it_is_short_and_the_status_is_in_the_first_screen():
    assert len(README.splitlines()) < 120
    first = "\n".join(README.splitlines()[:14])
    assert "measured" in first and "not yet run on a card" in first and speed.BEGIN in first


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


def measured() -> store.Record:
    """A record of all cases in the picture, in which plain torch takes ten times as long."""
    rows = [
        bench_records.row(case, op=op, what=name, backend=backend, slower=slower)
        for op, case, _ in speed.SHOWN
        for name in speed.PASSES
        for backend, slower in (("cpu", 1.0), ("torch", 10.0))
    ]
    return bench_records.record(*rows, processor="A Processor")


def test_picture_and_words_are_made_of_the_committed_file():
    record = speed.committed()
    assert speed.block(record) in README
    assert speed.PICTURE.exists() == (record is not None)
    if record is not None:
        assert speed.PICTURE.read_text(encoding="utf-8") == speed.draw(record)
        assert [words for words, _ in speed.ratios(record)] == [words for _, _, words in speed.SHOWN]


def test_the_picture_names_where_it_was_taken_and_serves_light_and_dark_pages():
    drawn = speed.draw(measured())
    for named in ("A Processor", " threads", f"torch {torch.__version__}", "0123456789", "10.0x", "dark"):
        assert named in drawn
    assert drawn.count("10.0x") == len(speed.SHOWN) * len(speed.PASSES)
    ElementTree.fromstring(drawn)


def test_what_failed_its_check_is_not_drawn():
    record, (op, case, words) = measured(), speed.SHOWN[0]
    for row in record["rows"]:
        if (row["op"], row["case"], row["backend"]) == (op, case, "cpu"):
            row["verified"] = False
    assert words not in dict(speed.ratios(record)) and words not in speed.draw(record)


def test_the_command_measures_what_is_shown():
    arguments = make_parser().parse_args(speed.command())
    cases = {
        "ms_deform_attn": ATTENTION_CASES,
        "adapter_bottleneck": ADAPTER_CASES,
        "token_pool": TOKEN_CASES,
    }
    for op, case, _ in speed.SHOWN:
        assert case in cases[op] and op in arguments.ops and case in arguments.cases
    assert set(speed.PASSES) == set(arguments.passes)


def test_the_words_are_written_between_the_marks(monkeypatch, tmp_path):
    for name in ("PAGE", "PICTURE"):
        monkeypatch.setattr(speed, name, tmp_path / name)
    speed.PAGE.write_text(f"before\n{speed.block(None)}\nafter\n")
    speed.write(measured())
    assert speed.PAGE.read_text() == f"before\n{speed.block(measured())}\nafter\n"
    assert speed.PICTURE.read_text() == speed.draw(measured())


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
