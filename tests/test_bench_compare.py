# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench compare`: compares two files, or, with --live, two builds in processes that take turns."""

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.prove_compare import copied
from tests.bench_records import record, row
from vitkern.bench import live, store
from vitkern.bench.live_worker import MEASURING
from vitkern.cli import main
from vitkern.commands.errors import CommandError


@pytest.fixture
def files(tmp_path):
    def write(a: store.Record, b: store.Record) -> tuple[str, str]:
        for name, what in (("a", a), ("b", b)):
            store.write(tmp_path / f"{name}.json", what)
        return str(tmp_path / "a.json"), str(tmp_path / "b.json")

    return write


def test_two_files_are_compared_row_by_row(files, capsys):
    a, b = files(record(row("same"), row("slow")), record(row("same"), row("slow", slower=1.3), row("new")))
    assert main(["bench", "compare", a, b]) == 0
    said = capsys.readouterr().out
    assert "1.300 [1.300, 1.300]  slower" in said
    assert said.splitlines()[-1] == "1 no difference, 1 slower, 1 only in B"


@pytest.mark.parametrize(
    "b, status",
    [
        (row(slower=1.3), 1),
        (row(slower=1.07), 0),
        (row(slower=0.5), 0),
        (row(reason="output is off by 1"), 1),
    ],
)
def test_fail_on_slower_is_for_what_became_slower_or_wrong(b, status, files):
    assert main(["bench", "compare", *files(record(row()), record(b)), "--fail-on", "slower"]) == status


def test_what_counts_as_a_difference_can_be_told(files):
    a, b = files(record(row()), record(row(slower=1.04)))
    assert main(["bench", "compare", a, b, "--fail-on", "slower"]) == 0
    assert main(["bench", "compare", a, b, "--fail-on", "slower", "--smallest", "0.02"]) == 1


def test_files_without_a_common_row_are_refused(files, capsys):
    assert main(["bench", "compare", *files(record(row("one")), record(row("other")))]) == 2
    assert "have no row in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value", [("--pass", "forward"), ("--launches", "3"), ("--rounds", "0"), ("--batch", "0")]
)
def test_what_is_for_builds_is_refused_with_files(option, value, files, capsys):
    assert main(["bench", "compare", *files(record(row()), record(row())), option, value]) == 2
    assert f"{option} is for --live" in capsys.readouterr().err


def test_what_is_for_files_is_refused_with_builds(capsys):
    assert main(["bench", "compare", "--live", "A", "B", "--anyway"]) == 2
    assert "--anyway is for files" in capsys.readouterr().err


@pytest.mark.parametrize("smallest", ["-1", "nan", "inf"])
def test_a_smallest_difference_is_a_number_of_at_least_0(smallest, files, capsys):
    a, b = files(record(row()), record(row()))
    assert main(["bench", "compare", a, b, "--smallest", smallest]) == 2
    assert f"--smallest must be at least 0, got {smallest}" in capsys.readouterr().err
    assert main(["bench", "compare", a, b, "--smallest", "0"]) == 0


def test_different_machines_are_refused(files, capsys):
    a, b = files(record(row(), processor="One"), record(row(), processor="Other"))
    assert main(["bench", "compare", a, b]) == 2
    assert "A was measured on One" in capsys.readouterr().err
    assert main(["bench", "compare", a, b, "--anyway"]) == 0
    assert "different machines" in capsys.readouterr().err


def test_another_torch_is_told(files, capsys):
    other = record(row())
    other["environment"]["torch"]["version"] = "2.4.1"
    assert main(["bench", "compare", *files(record(row()), other)]) == 0
    assert "warning: different torch" in capsys.readouterr().err


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("build"))


def test_a_build_is_an_interpreter_an_environment_or_a_folder(build, tmp_path):
    environment = tmp_path / "bin" / "python"
    environment.parent.mkdir()
    environment.symlink_to(sys.executable)
    assert live.Build.at("A", sys.executable).interpreter == sys.executable
    assert live.Build.at("A", str(tmp_path)).interpreter == str(environment)
    assert live.Build.at("A", str(build)).folder == str(build)
    with pytest.raises(CommandError, match="B, .*nowhere, is not a build"):
        live.Build.at("B", str(tmp_path / "nowhere"))


def test_files_of_runs_are_no_builds(files, capsys):
    assert main(["bench", "compare", "--live", *files(record(row()), record(row()))]) == 2
    assert "a.json, is not a build: it must be a Python interpreter" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["#!/bin/sh\necho hello", "neither a program nor a script"])
def test_a_program_that_is_no_interpreter_is_told(script, tmp_path, capsys):
    program = tmp_path / "program"
    program.write_text(script)
    program.chmod(0o755)
    assert main(["bench", "compare", "--live", str(program), str(program), "--op", "token_pool"]) == 2
    assert f"A, {program}, is no Python interpreter" in capsys.readouterr().err


def test_builds_are_measured_by_this_harness_and_not_by_their_own(build):
    """The copy, like an old build, has no harness: this one measures the copy's kernels."""
    for package in MEASURING:
        shutil.rmtree(build / "vitkern" / package)
    process = live.Process(live.Build.at("A", str(build)))
    try:
        found = process.ask("hello", threads=1)
        key = ("adapter_bottleneck", "swin-b-4", 1, "cpu", "float32", "forward", "cpu")
        opened = process.ask("open", key=key, check=True)
        sampled = process.ask("sample", calls=opened["calls"])
    finally:
        process.close()
    assert Path(found["package"]).parent == build / "vitkern"
    assert Path(found["compiled"]).parent == build / "vitkern"
    assert opened["reason"] is None
    assert sampled["milliseconds"] > 0


def test_what_a_build_cannot_run_is_its_failure(build):
    process = live.Process(live.Build.at("A", str(build)))
    try:
        process.ask("hello", threads=1)
        key = ("token_pool", "vt-64", 1, "cpu", "float32", "forward", "cuda")
        assert "backend cuda cannot run" in process.ask("open", key=key, check=True)["reason"]
    finally:
        process.close()


def test_a_build_that_ends_is_told_of(tmp_path):
    (tmp_path / "vitkern").mkdir()
    (tmp_path / "vitkern" / "__init__.py").write_text("raise SystemExit('broken build')")
    process = live.Process(live.Build.at("B", str(tmp_path)))
    with pytest.raises(CommandError, match="the process of B ended"):
        process.ask("hello", threads=1)
    process.close()


class Scripted:
    """Stands in for both processes and records which one was asked."""

    asked: list[str] = []  # noqa: RUF012
    slower = {"A": 1.0, "B": 1.2}  # noqa: RUF012

    def __init__(self, build: live.Build) -> None:
        self.build = build

    def ask(self, do: str, **question: object) -> dict[str, object]:
        if do == "sample":
            self.asked.append(self.build.name)
        name = self.build.name
        answers = {
            "hello": {"words": "a machine", "compiled": "somewhere"},
            "open": {"reason": None, "calls": 3},
            "sample": {"milliseconds": self.slower[name]},
        }
        return answers[do]

    def close(self) -> None:
        pass


def test_builds_take_turns_abba_and_the_slow_one_is_named(monkeypatch, capsys):
    monkeypatch.setattr(live, "Process", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    command = "bench compare --live A B --op token_pool --case vt-64 --dtype fp32 --pass forward --device cpu"
    command += " --launches 2 --rounds 2 --fail-on slower"
    monkeypatch.setattr(live.Build, "at", lambda name, path: live.Build(name, path))
    assert main(command.split()) == 1
    assert "".join(Scripted.asked) == "ABBABAAB" * 2
    assert capsys.readouterr().out.splitlines()[-1] == "1 slower"


@pytest.mark.parametrize("option", ["--launches", "--rounds"])
def test_nothing_at_all_is_no_comparison(option, capsys):
    assert main(["bench", "compare", "--live", sys.executable, sys.executable, option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_a_wrong_build_gets_no_verdict(monkeypatch):
    class Wrong(Scripted):
        def ask(self, do: str, **question: object) -> dict[str, object]:
            is_wrong = do == "open" and self.build.name == "B"
            return {"reason": "output is off", "calls": 0} if is_wrong else super().ask(do, **question)

    monkeypatch.setattr(live, "Process", Wrong)
    monkeypatch.setattr(live.Build, "at", lambda name, path: live.Build(name, path))
    request = live.Request(["token_pool"], ["vt-64"], dtypes=["fp32"], passes=["forward"], device="cpu")
    (compared,) = live.compare_builds("A", "B", request, launches=1, rounds=1, smallest=0.05)
    assert compared.verdict == "FAILED in B: output is off"
    assert compared.is_worse


def test_an_interrupted_comparison_judges_what_it_has(monkeypatch, capsys):
    class Interrupted(Scripted):
        def ask(self, do: str, **question: object) -> dict[str, object]:
            if do == "sample" and len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().ask(do, **question)

    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(live, "Process", Interrupted)
    monkeypatch.setattr(live.Build, "at", lambda name, path: live.Build(name, path))
    request = live.Request(["token_pool"], ["vt-64"], dtypes=["fp32"], device="cpu")
    compared = live.compare_builds("A", "B", request, launches=1, rounds=1, smallest=0.05)
    assert [row.verdict for row in compared] == ["slower", "not measured"]


def test_a_slowed_copy_still_gives_right_results(tmp_path):
    """benchmarks/prove_compare.py measures how much slower it is."""
    slowed = copied(tmp_path, factor=1.2)
    assert "_slowed" in (slowed / "vitkern" / "functional.py").read_text()
    process = live.Process(live.Build.at("B", str(slowed)))
    try:
        process.ask("hello", threads=1)
        key = ("token_pool", "vt-64", 1, "cpu", "float32", "forward", "cpu")
        assert process.ask("open", key=key, check=True)["reason"] is None
    finally:
        process.close()
