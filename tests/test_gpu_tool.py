# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a card: its dry run, its refusals, stopping and resuming, the names of its files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import common, correct, resume
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.common import DONE, FAILED, LEFT, REFUSED, ROOT, Budget
from vitkern.cases import ADAPTER_CASES, ATTENTION_CASES, TOKEN_CASES
from vitkern.cases.ops import OPS
from vitkern.check import plan as check_plan
from vitkern.check import routes
from vitkern.cli import make_parser
from vitkern.commands.choices import DTYPES, requested

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is refused here")


class Clock:
    """A clock whose time is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def printing(name: str, code: str) -> correct.Step:
    return correct.Step(name, (sys.executable, "-c", code))


@pytest.mark.slow
def test_the_dry_run_lists_every_kind_of_test_and_check(capfd):
    assert main(["correct", "--dry"]) == DONE
    said = capfd.readouterr().out
    assert "python -m vitkern doctor\npython -m pytest -m gpu -q\n" in said
    for op in OPS:
        for route in ("cuda-gpu", "triton-gpu"):
            assert f"python -m vitkern check --device cuda --op {op} --backend {route}\n" in said
            backend = route.removesuffix("-gpu")
            for dtype in DTYPES:
                for mode in ("free", "deterministic"):
                    matrix = "tests/test_gpu.py::test_forward_and_backward_match_the_oracle"
                    assert f"{matrix}[{op}-{backend}-{dtype}-{mode}]\n" in said
    for promise in (
        "test_contract[cuda-gpu-ms_deform_attn]",
        "test_contract[triton-gpu-token_project]",
        "test_the_current_stream_is_used[ms_deform_attn_fused-triton]",
        "test_a_device_that_is_not_the_current_one[token_pool-cuda]",
        "test_forward_and_backward_are_captured_in_a_graph[adapter_bottleneck-triton-deterministic]",
        "test_no_call_waits_for_the_device[token_project-cuda]",
        "test_gpu_forward_and_backward_beyond_32_bit_offsets[triton]",
        "test_gpu_rows_beyond_32_bit_offsets[cuda-token_pool]",
    ):
        assert promise in said, promise


def test_the_dry_run_lists_every_tool_of_the_sanitizer(capsys):
    assert main(["sanitize", "--dry"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * len(OPS) * 2
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert sum(f"--tool={tool} " in line for line in lines) == len(OPS) * 2


def test_every_command_of_vitkern_is_known_with_its_arguments():
    for step in (*correct.correct(), *correct.sanitized()):
        if "vitkern" in step.command:
            make_parser().parse_args(step.command[step.command.index("vitkern") + 1 :])  # or SystemExit


@pytest.mark.parametrize("op", OPS)
def test_a_card_has_its_checks(op, monkeypatch):
    """Each op has checks on each backend, of every kind and dtype; under a sanitizer few, and no gradcheck."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(routes, "_objection", lambda backend: None)
    for step in correct.correct()[2:]:
        if f" {op} " in step.name:
            tasks = planned(step.command)
            assert {task.kind for task in tasks} >= {"oracle", "repeat"}
            assert {task.dtype for task in tasks} >= {"fp32", "fp16", "bf16"}
            assert ("gradcheck" in {task.kind for task in tasks}) == ("cuda-gpu" in step.name)
    for step in correct.sanitized():
        if f" {op} " in step.name:
            assert {task.kind for task in planned(step.command)} == {"oracle", "repeat"}
            assert len(planned(step.command)) <= 40


def planned(command: tuple[str, ...]) -> list:
    arguments = make_parser().parse_args(command[command.index("check") :])
    return check_plan.plan(requested(check_plan.Request, arguments)).tasks


def test_the_dry_run_lists_every_shape_and_contender(capsys):
    assert main(["bench", "--dry"]) == DONE
    said = capsys.readouterr().out
    attention = 3 * len(ATTENTION_CASES)
    assert f"{3 * attention + 3 * len(ADAPTER_CASES) + 6 * len(TOKEN_CASES)} subjects" in said
    for name in ("torch compiled", "vitkern compiled", "torch attention", "mmcv", "deformops", "hub kernel"):
        assert name in said
    assert said.count("not mmcv: ") <= 1  # once for all ops, not for each


@pytest.mark.parametrize("part, times", [("bench", 2), ("tune", 3)])  # passes, or tables of block sizes
def test_the_dry_run_says_how_long_it_takes(part, times, monkeypatch, capsys):
    monkeypatch.setattr(getattr(entry, part), "SECONDS", 960 / times)
    assert main(f"{part} --dry --op token_pool --case vt-64 --dtype bf16 --seconds 100".split()) == DONE
    said = capsys.readouterr().out
    assert "Timing may take 16 minutes; " in said and "Calls of 100 s: 10 or more." in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_starts_the_dry_run(tmp_path):
    """A fake environment, with stamps newer than all sources, saves the setup."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for stamp, text in {".made": "", ".requirements": "", ".built": "CUDA= ARCHITECTURES=\n"}.items():
        (tmp_path / stamp).write_text(text)
    command = ["make", "gpu", "PART=sanitize", "DRY=1", f"VENV={tmp_path}"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * len(OPS) * 2


@pytest.mark.skipif(os.name != "posix", reason="make_venv is for a shell")
def test_an_environment_that_borrows_sees_the_packages_of_its_python(tmp_path):
    made = subprocess.run(
        [ROOT / "tools" / "make_venv", tmp_path / "venv"],
        env={**os.environ, "PYTHON": sys.executable, "BORROW": "1"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    code = (
        "import importlib.util, sys; print(*(importlib.util.find_spec(name).origin for name in sys.argv[1:]))"
    )
    command = [tmp_path / "venv" / "bin" / "python", "-c", code, "torch", "pytest"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == [importlib.util.find_spec(name).origin for name in ("torch", "pytest")]


@needs_no_gpu
@pytest.mark.parametrize("part", ["correct", "sanitize", "bench", "tune"])
def test_without_a_card_it_is_one_sentence(part, capsys):
    assert main([part]) == REFUSED
    said = capsys.readouterr().err
    assert said.startswith("make gpu: torch finds no usable GPU here") and said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "conv"], "unknown op 'conv': choose from ms_deform_attn, "),
        (["--case", "nothing-*"], "unknown case 'nothing-*': choose from "),
        (["--dtype", "fp8"], "unknown dtype 'fp8': choose from bf16, fp16, fp32"),
        (["--seconds", "0"], "--seconds has to be more than 0, got 0"),
        (["--without", "nope"], "unknown contender 'nope': choose from torch compiled, vitkern compiled, "),
    ],
)
def test_what_cannot_be_had_is_one_sentence(arguments, message, capsys):
    assert main(["bench", "--dry", *arguments]) == REFUSED
    assert message in capsys.readouterr().err


UNHEEDED = [
    (part, f"--{option}")
    for part in ("correct", "sanitize", "table")
    for option in ("op", "case", "dtype", "without")
]


@pytest.mark.parametrize("part, option", [*UNHEEDED, ("tune", "--without")])
def test_what_a_part_does_not_heed_is_refused(part, option, capsys):
    assert main([part, option, "token_pool"]) == REFUSED
    said = capsys.readouterr()
    assert said.err == f"make gpu: {option} has no effect on {part}: leave it out\n" and not said.out


def test_the_table_is_not_written_by_a_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(entry.table, "main", None)
    assert main(["table", "--dry"]) == REFUSED
    assert "--dry has no effect on table" in capsys.readouterr().err


def architectures(path: Path, **programs: str) -> subprocess.CompletedProcess:
    """Runs tools/gpu_architectures with only these programs on PATH."""
    for name, text in programs.items():
        program = path / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    for name in ("sh", "sort", "tr", "sed", "paste"):
        (path / name).symlink_to(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}")
    return subprocess.run(
        ["/bin/sh", ROOT / "tools" / "gpu_architectures"],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_kernels_are_built_for_the_cards_that_there_are(tmp_path):
    done = architectures(tmp_path, nvcc="", nvidia_smi="echo 9.0; echo 8.6; echo 9.0")
    assert (done.returncode, done.stdout) == (0, "86-real,90-real\n"), done.stderr


@pytest.mark.parametrize(
    "programs, message",
    [
        ({"nvidia_smi": "echo 9.0"}, "make gpu needs nvcc of the CUDA toolkit on PATH"),
        ({"nvcc": ""}, "make gpu needs an NVIDIA card and its driver"),
        ({"nvcc": "", "nvidia_smi": "exit 9"}, "make gpu needs an NVIDIA card and its driver"),
    ],
)
def test_what_a_build_lacks_is_one_sentence(programs, message, tmp_path):
    done = architectures(tmp_path, **programs)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_steps_go_on_where_they_stopped(tmp_path, capfd):
    log = tmp_path / "log"
    write = f"open({str(log)!r}, 'a').write"
    steps = [printing("one", f"{write}('1')"), printing("two", f"{write}('2'); raise SystemExit(7)")]
    assert correct.run(steps, tmp_path / "state", Budget(60)) == FAILED
    assert "FAILED with 7: python -c" in capfd.readouterr().out
    assert (
        correct.run([steps[1], printing("three", f"{write}('3')")], tmp_path / "state", Budget(60)) == FAILED
    )
    # The failed step ran again, after the step that had never run.
    assert log.read_text() == "1232"
    mended = [steps[0], printing("two", f"{write}('4')")]
    assert correct.run(mended, tmp_path / "state", Budget(60)) == DONE
    assert log.read_text() == "12324"


def test_no_step_is_begun_when_the_time_is_over(tmp_path, capsys):
    assert correct.run([printing("one", "1 / 0")], tmp_path, Budget(1)) == LEFT
    assert "1 steps, 0 FAILED, 1 left\nCall again to go on with: one" in capsys.readouterr().out


def test_a_step_that_outlasts_the_limit_is_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(correct, "LEAST_SECONDS", 0.1)
    clock = Clock()
    budget = Budget(10.0, clock)
    sleeping = printing("asleep", "import time; time.sleep(60)")
    clock.now = 9.5  # half a second is left: the step may have a whole run next time
    assert correct.run([sleeping], tmp_path, budget) == LEFT
    assert correct.run([sleeping], tmp_path, Budget(0.5)) == FAILED
    assert "FAILED: it takes more than the 0 s that it had" in capsys.readouterr().out


TESTS = """
    import pathlib, time
    import pytest

    def test_one(): pathlib.Path("log").open("a").write("1")
    def test_two(): raise RuntimeError(pathlib.Path("fails").read_text())
    def test_three(): pathlib.Path("log").open("a").write("3")
    @pytest.mark.skip(reason="one GPU")
    def test_four(): pass
    def test_slow(): time.sleep(0.3)
    def test_last(): pathlib.Path("log").open("a").write("5")
"""


def pytest_in(folder: Path, *, seconds: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.resume"]
    options = ["--outcomes", "outcomes.jsonl", "--until", str(time.time() + seconds), "test_it.py"]
    return subprocess.run(
        [*command, *options],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_tests_go_on_one_by_one_and_what_failed_comes_last(tmp_path):
    (tmp_path / "test_it.py").write_text(dedent(TESTS))
    (tmp_path / "fails").write_text("wrong")
    outcomes = tmp_path / "outcomes.jsonl"
    first = pytest_in(tmp_path, seconds=-1)
    assert "the time is over" in first.stdout
    assert resume.read(outcomes) == {"test_it.py::test_one": "passed"}
    assert resume.collected(outcomes) == 6
    second = pytest_in(tmp_path, seconds=60)
    assert second.returncode == 1 and "4 passed" not in first.stdout
    found = resume.read(outcomes)
    assert found["test_it.py::test_two"] == "failed" and found["test_it.py::test_four"] == "skipped"
    assert (tmp_path / "log").read_text() == "135"
    third = pytest_in(tmp_path, seconds=60)
    assert "1 failed, 5 deselected" in third.stdout


def test_an_error_of_the_card_ends_the_process(tmp_path):
    (tmp_path / "test_it.py").write_text(dedent(TESTS))
    (tmp_path / "fails").write_text("CUDA error: an illegal memory access was encountered")
    first = pytest_in(tmp_path, seconds=60)
    assert "the card is in an undefined state after test_it.py::test_two" in first.stdout
    assert (tmp_path / "log").read_text() == "1"
    pytest_in(tmp_path, seconds=60)  # a new process: all others, and then the guilty one again
    assert (tmp_path / "log").read_text() == "135"


def test_a_test_that_ends_the_process_does_not_keep_the_rest_from_running(tmp_path):
    (tmp_path / "test_it.py").write_text(
        dedent(TESTS).replace("raise RuntimeError", "import os; os.abort() or str")
    )
    assert pytest_in(tmp_path, seconds=60).returncode < 0
    assert (tmp_path / "log").read_text() == "1"
    assert resume.read(tmp_path / "outcomes.jsonl")["test_it.py::test_two"] == "failed"
    pytest_in(tmp_path, seconds=60)
    assert (tmp_path / "log").read_text() == "135"


def test_a_step_of_tests_says_how_many_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(correct, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "test_it.py").write_text(dedent(TESTS).replace("raise RuntimeError", "str"))
    (tmp_path / "fails").write_text("no")
    step = correct.Step("tests", (sys.executable, "-m", "pytest", "-q", "test_it.py"), resumes=True)
    monkeypatch.setattr(correct, "GRACE", 1e6)
    assert correct._outcome(step, tmp_path, Budget(60)) == "left: 5 of 6 tests, 0 of the others FAILED"
    monkeypatch.setattr(correct, "GRACE", 0.0)
    assert correct._outcome(step, tmp_path, Budget(60)) == "passed"
    assert correct._outcome(step, tmp_path, Budget(60)) == "passed"


def test_no_work_is_begun_that_took_longer_before_than_is_left():
    clock = Clock()
    budget = Budget(100.0, clock)
    assert budget.allows_more()
    budget.timed(lambda: setattr(clock, "now", 40.0))
    assert budget.allows_more() and budget.longest == 40.0
    clock.now = 61.0
    assert not budget.allows_more() and budget.left() == 39.0


CARD = {"cuda": {"devices": [{"name": "NVIDIA H100 80GB HBM3"}]}}


def test_files_are_named_by_card_day_and_commit(tmp_path):
    clean = CARD | {"commit": {"id": "0123456789abcdef", "dirty": False}}
    assert common.folder_of(clean) == "nvidia-h100-80gb-hbm3"
    assert common.version_of(clean) == "0123456789"
    changed = common.version_of(CARD | {"commit": {"id": "0123456789abcdef", "dirty": True}})
    assert changed.startswith("0123456789-changed-")
    assert common.version_of(CARD | {"commit": None}) == "unknown"
    new = common.file_for(tmp_path, "0123456789", "2026-01-02")
    assert new == tmp_path / "2026-01-02-0123456789.json"
    (tmp_path / "2026-01-01-0123456789.json").touch()
    (tmp_path / "2026-01-01-0123456789-changed-abcdef.json").touch()
    assert common.file_for(tmp_path, "0123456789", "2026-01-02").name == "2026-01-01-0123456789.json"


@pytest.mark.parametrize(
    "part, folder, left_out", [("bench", "", ("torch compiled",)), ("tune", "tune/", ())]
)
def test_each_part_goes_on_in_its_own_file_unless_it_is_to_begin_anew(
    part, folder, left_out, tmp_path, monkeypatch
):
    """Runs the command line with a fake card."""
    facts = CARD | {"commit": {"id": "0123456789abcdef", "dirty": False}}
    monkeypatch.setattr(entry, "demand_a_card", lambda: None)
    monkeypatch.setattr(entry, "environment", lambda commit: facts)
    given = []
    monkeypatch.setattr(getattr(entry, part), "run", lambda *arguments: given.append(arguments) or DONE)
    begun = tmp_path / f"nvidia-h100-80gb-hbm3/{folder}2026-01-01-0123456789.json"
    begun.parent.mkdir(parents=True)
    begun.touch()
    arguments = [part, *f"--results {tmp_path} --op token_pool --case vt-64 --seconds 100".split()]
    assert main([*arguments, *(f"--without={name}" for name in left_out)]) == DONE
    (wanted, path, environment, budget, *without) = given.pop()
    assert {(subject.op.name, subject.case.name) for subject in wanted} == {("token_pool", "vt-64")}
    assert (path, environment, without) == (begun, facts, [left_out] if left_out else [])
    assert 90 < budget.left() <= 100 and begun.exists()
    assert main([*arguments, "--fresh"]) == DONE
    assert not begun.exists()


def test_the_commit_can_be_named_where_no_repository_tells_it(monkeypatch):
    monkeypatch.setattr(common, "facts_of_the_machine", lambda: {"commit": None})
    assert common.environment("abc")["commit"] == {"id": "abc", "dirty": False}
    assert common.environment()["commit"] is None
