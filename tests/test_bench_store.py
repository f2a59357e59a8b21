# SPDX-License-Identifier: Apache-2.0
"""The file of a run: how it is written, and what is refused when it is read."""

import json

import pytest

from tests.bench_records import record, row
from vitkern.bench import store
from vitkern.cli import main
from vitkern.commands.errors import CommandError


def test_rows_are_held_up_where_their_anchor_was():
    """By more than threads and caches make, of the best of the same anchor and device."""
    other = {"anchor": "gather"}
    rows = [row("best", anchor=2.0), row("slower", anchor=2.9), row("held", anchor=3.1)]
    rows += [row("of another", anchor=20.0) | other, row("on a card", anchor=0.1) | {"device": "cuda"}]
    rows += [row("a moment", anchor=9.0) | {"anchor_ms": [[9.0, 2.1], [50.0]]}, row("wrong", reason="off")]
    assert {case for _, case, *_ in store.held_up(rows)} == {"held"}


def test_a_folder_is_no_file_to_write_and_nothing_is_left_beside_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder", ""):
        assert main(["bench", "run", "--op", "token_pool", "--json", name]) == 2
        assert f"cannot write {name or '.'}: it is a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_cannot_be_put_in_place_is_taken_away(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(store.os, "replace", fails)
    with pytest.raises(CommandError, match=r"cannot write .*out\.json: no room"):
        store.write(tmp_path / "out.json", record(row()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, objection",
    [
        ("{", "Expecting property name"),
        ("[]", "it does not say its schema"),
        ('{"schema": 99}', "its schema is 99, this vitkern knows 1"),
        ('{"schema": 1}', "it lacks anchors, ceilings"),
    ],
)
def test_files_that_are_none_of_ours_are_refused(text, objection, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text(text)
    assert main(["bench", "report", str(path)]) == 2
    assert objection in capsys.readouterr().err


EDITED = {
    "rows that are none": ({"rows": 5}, "its rows are no list"),
    "no rows": ({"rows": None}, "its rows are no list"),
    "a row that is none": ({"rows": [1]}, "row 1: it is no object"),
    "an environment of nothing": (
        {"environment": {}},
        "its environment lacks commit, cpu, cuda, torch, vitkern",
    ),
    "no environment": ({"environment": None}, "its environment is no object"),
    "a processor of nothing": (
        {"environment": record()["environment"] | {"cpu": {}}},
        "its environment's cpu lacks logical_cores, model",
    ),
    "no samples": (
        {"rows": [row() | {"samples_ms": None}]},
        "it needs samples, and one of the anchor for each",
    ),
    "a sample that is none": ({"rows": [row() | {"samples_ms": [5]}]}, "it is not built as one"),
    "no times": ({"rows": [row() | {"ms": None}]}, "row token_pool vt-64: its ms is no object"),
    "times that lack one": ({"rows": [row() | {"ms": {"p50": 1.0}}]}, "its ms lacks min"),
    "a time that is none": (
        {"rows": [row() | {"ms": {"min": "1", "p50": 1.0}}]},
        "its figures are no numbers",
    ),
    "no share": ({"rows": [row() | {"share": None}]}, "its figures are no numbers"),
    "a name that is none": ({"rows": [row() | {"case": []}]}, "its case is no name"),
    "no errors": ({"rows": [row() | {"errors": {}}]}, "its figures are no numbers"),
}


@pytest.mark.parametrize("edits, objection", EDITED.values(), ids=EDITED)
def test_what_an_editor_has_spoilt_is_refused(edits, objection, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(record() | edits))
    for command in (["report", path], ["compare", path, path]):
        assert main(["bench", *map(str, command)]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        assert "out.json is no file of `vitkern bench run --json`: " in said
        assert objection in said
