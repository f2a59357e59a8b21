# SPDX-License-Identifier: Apache-2.0
"""The file of a run: writing it, and refusing invalid ones."""

import contextlib
import json
import threading

import pytest

from tests.bench_records import record, row
from vitkern.bench import store, verdicts
from vitkern.bench.compare import compare_files
from vitkern.bench.report import write_reports
from vitkern.cli import main
from vitkern.commands.errors import CommandError


def test_rows_are_held_up_where_their_anchor_was():
    """An anchor counts as slow beyond 1.5 times its best time on the same device."""
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
    "rows that are none": ({"rows": 5}, "its rows cannot be 5"),
    "no rows": ({"rows": None}, "its rows cannot be None"),
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
    "no samples": ({"rows": [row() | {"samples_ms": None}]}, "its samples_ms cannot be None"),
    "a sample that is none": ({"rows": [row() | {"samples_ms": [5]}]}, "its samples_ms cannot be [5]"),
    "samples without an anchor": (
        {"rows": [row() | {"anchor_ms": [[1.0]]}]},
        "it needs one sample of the anchor for each of its own",
    ),
    "no times": ({"rows": [row() | {"ms": None}]}, "row token_pool vt-64: its ms cannot be None"),
    "times that lack one": ({"rows": [row() | {"ms": {"p50": 1.0}}]}, "its ms lacks min"),
    "a time that is none": (
        {"rows": [row() | {"ms": {"min": "1", "p50": 1.0}}]},
        "its ms cannot be {'min': '1', 'p50': 1.0}",
    ),
    "no share": ({"rows": [row() | {"share": None}]}, "its share cannot be None"),
    "a name that is none": ({"rows": [row() | {"case": []}]}, "row number 1: its case cannot be []"),
    "a name of two lines": ({"rows": [row() | {"op": "a\nb"}]}, "row number 1: its op cannot be 'a\\nb'"),
    "no errors": ({"rows": [row() | {"errors": {}}]}, "it must have errors, all of them numbers"),
}


@pytest.mark.parametrize("edits, objection", EDITED.values(), ids=EDITED)
def test_what_an_editor_has_spoilt_is_refused(edits, objection, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(record() | edits))
    for command in (["report", path], ["compare", path, path]):
        assert main(["bench", *map(str, command)]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        assert "out.json is not a file of `vitkern bench run --json`: " in said
        assert objection in said


BAD = {
    "nothing": None,
    "a flag": True,
    "a list": [],
    "an object": {},
    "a list of lists": [[]],
    "an object in one": {"min": {"p50": []}},
    "text": "<b>|\n\x00\ud800",
    "zero": 0,
    "a negative number": -1.5,
    "an endless number": 10**400,
    "infinity": float("inf"),
    "no number": float("nan"),
}


def _places(value, path=()):
    """The paths of all fields of a record, at any depth."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield (*path, name)
        yield from _places(part, (*path, name))


def _with(value, path, bad):
    if not path:
        return bad
    copied = value.copy()
    copied[path[0]] = _with(value[path[0]], path[1:], bad)
    return copied


GOOD = record(
    *(row(backend=backend, slower=slower) for backend, slower in (("cpu", 1.0), ("torch", 4.0))),
    row("vt-fpn", reason="off"),
)
GOOD["environment"] = {  # the fields that are read
    "cpu": {"model": "x86", "logical_cores": 2, "threads": 2, "chosen": "avx2"},
    "cuda": {"devices": [{"name": "GPU", "memory_gib": 80.0}]},
    "torch": {"version": "2"},
    "vitkern": {"version": "1"},
    "commit": {"id": "0123", "dirty": False},
}
# The first of all that are alike: row 0 is a good one, row 2 has failed.
PLACES = [
    path
    for path in _places(GOOD)
    if all(at in (0, 2) for at in path if isinstance(at, int)) and path[-1] != 2
]


@pytest.mark.parametrize("bad", BAD)
def test_a_file_with_any_field_spoilt_works_or_is_refused_in_a_sentence(bad, tmp_path, monkeypatch):
    """Reports and comparisons raise only CommandError, whichever field has the bad value."""
    good, path = tmp_path / "good.json", tmp_path / "out.json"
    store.write(good, GOOD)
    monkeypatch.setattr(verdicts, "RESAMPLES", 20)
    for place in PLACES:
        path.write_text(json.dumps(_with(GOOD, place, BAD[bad])))
        for use in (lambda: write_reports(path, None), lambda: compare_files(good, path, smallest=0.1)):
            with contextlib.suppress(CommandError):
                use()


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"schema": ' + "9" * 10_000 + "}", '{"schema": ' + "[" * 900 + "]" * 900 + "}", "\xff"],
)
def test_what_python_cannot_parse_is_refused_in_a_sentence(text, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text(text, encoding="latin-1")
    assert main(["bench", "report", str(path)]) == 2
    said = capsys.readouterr().err
    assert "out.json is not a file of `vitkern bench run --json`: " in said
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_read_is_not_called_invalid(tmp_path, capsys):
    missing = tmp_path / "missing.json"
    assert main(["bench", "report", str(missing)]) == 2
    assert capsys.readouterr().err == f"vitkern bench: cannot read {missing}: No such file or directory\n"


def test_runs_that_write_one_file_at_a_time_do_not_meet(tmp_path):
    """Temporary files with the same name would let one run move the other's file away."""
    path, failed = tmp_path / "out.json", []

    def write() -> None:
        try:
            for _ in range(30):
                store.write(path, GOOD)
        except CommandError as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert store.read(path)["rows"] == GOOD["rows"]
    assert [found.name for found in tmp_path.iterdir()] == ["out.json"]


def test_a_run_whose_file_another_has_written_goes_on_beside_it(tmp_path, capsys):
    path = tmp_path / "out.json"
    first, second = store.File(path), store.File(path)
    for _ in range(2):
        first.write(record(row("first")))
    assert capsys.readouterr().err == ""
    second.write(record(row("second")))
    for _ in range(2):
        first.write(record(row("first")))
    assert capsys.readouterr().err == (
        f"warning: something else has written {path} since this run began, which goes on in {first.path}\n"
    )
    assert [store.read(file.path)["rows"][0]["case"] for file in (first, second)] == ["first", "second"]
    assert second.path == path
