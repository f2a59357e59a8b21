# SPDX-License-Identifier: Apache-2.0
"""A second opinion on races of ms_deform_attn: gcc's libtsan, told what is ordered by csrc/emulator/libtsan.cpp.

``python -m tests.libtsan`` runs the cases of tests/race_cases.py with all barriers and without each of them, and the
kernels of tests/emulator/races.cu, with both detectors. It writes tests/libtsan.json and draws docs/emulator.md from
it; with --check it fails where the verdicts are others than the committed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

from tests import emulated, races
from tests.race_cases import CASES, Call, Case
from vitkern.ops import native

OP = "ms_deform_attn"
FAULTS = emulated.ROOT / "tests" / "emulator" / "races.cu"
MOST_BLOCKS = 3  # of a launch; each of their threads costs libtsan a megabyte
Key = tuple[str, str]  # case, barrier
Pairs = set[tuple[str, ...]]  # of lines whose accesses race

# A child process that is forked has one thread. Each race is told, whatever was told before.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
_OPTIONS = "exitcode=0 symbolize=0 suppress_equal_addresses=0 history_size=0"


def cases() -> list[Case]:
    return [case for case in CASES if case.op == OP]


def barriers() -> list[str]:
    return [barrier for barrier in races.barriers() if barrier.split("/")[0] == OP]


def planted() -> list[str]:
    """The kernels of FAULTS: "fine", and one for each fault."""
    return re.findall(r"KERNEL\((\w+)\),", FAULTS.read_text())


def runs() -> Iterator[tuple[Case, Call, str]]:
    """Each case with all barriers, named "", and in float32, which every kernel and form has, without each of them."""
    for case in cases():
        torch.manual_seed(0)
        call = case.make()
        yield case, call, ""
        if call.inputs["value"].dtype == torch.float32:
            yield from ((case, call, barrier) for barrier in barriers())


# ---- The opinion of races.cpp


def told_by_races(text: str) -> Pairs:
    """The pairs of lines in a report. A read of what nothing has written has one line."""
    found = (re.findall(r" at ((?:\S+:\d+ < )*\S+:\d+)", line) for line in text.splitlines())
    return {tuple(sorted({re.search(r"\S+\.cuh?:\d+", one)[0] for one in lines})) for lines in found if lines}


def of_races() -> dict[Key, Pairs]:
    """By case and barrier that is switched off."""
    found = {}
    for case, call, barrier in runs():
        text = ""
        try:
            with races.kernels(call.inputs, BLOCKS=MOST_BLOCKS, WITHOUT=barrier or None):
                call.run()
        except RuntimeError as error:
            text = str(error)
        found[str(case), barrier] = told_by_races(text)
    return found


# ---- The opinion of libtsan


def told_by_libtsan(log: str, binary: Path) -> Pairs:
    """The pairs of lines in a log."""
    found = []
    for report in log.split("WARNING: ThreadSanitizer: ")[1:]:
        accesses = re.findall(r"^  \S.* of size .*\n((?:    #.*\n)*)", report, re.MULTILINE)[:2]
        assert report.startswith("data race") and len(accesses) == 2, report
        found.append([re.findall(rf"{re.escape(binary.name)}\+(0x[0-9a-f]+)", frames) for frames in accesses])
    places = sorted({place for report in found for frames in report for place in frames})
    lines = dict(zip(places, _own_lines(places, binary)))
    return {
        tuple(sorted({next((lines[place] for place in frames if lines[place]), "?") for frames in report}))
        for report in found
    }


def _own_lines(places: list[str], binary: Path) -> Iterator[str]:
    """For each place the innermost line of a kernel that led there, "" if there is none."""
    after = [hex(int(place, 16) + 1) for place in places]
    for calls in races.calls_to(after, binary) if places else ():
        own = (call for call in calls if re.search(r"\.cuh?:", call.name))
        yield next((f"{call.parent.name}/{call.name}" for call in own), "")


def under_libtsan(command: list[object], log: Path, **variables: str) -> subprocess.Popen[str]:
    """A process that libtsan begins in, at addresses that suit it."""
    environment = {**os.environ, **_ENVIRONMENT, **variables, "TSAN_OPTIONS": f"{_OPTIONS} log_path={log}"}
    words = ["setarch", "-R", *map(str, command)]
    with log.with_suffix(".out").open("w") as out:
        return subprocess.Popen(words, env=environment, stdout=out, text=True)


def said(process: subprocess.Popen[str], log: Path) -> str:
    if process.wait():
        raise RuntimeError(f"{' '.join(process.args)} ended with status {process.returncode}")
    return log.with_suffix(".out").read_text()


def of_libtsan(lines: str, log: Path, module: Path) -> dict[Key, Pairs]:
    """By case and barrier that is switched off, from what `run` has printed."""
    found = {}
    for case, barrier, number in map(json.loads, lines.splitlines()):
        file = log.with_name(f"{log.name}.{number}")
        found[case, barrier] = told_by_libtsan(file.read_text() if file.exists() else "", module)
    return found


def run(module: Path) -> None:
    """Each run in a process of its own, whose number, printed with case and barrier, names libtsan's log."""
    os.environ[races.MODULE] = str(module)
    loaded = races.module()
    with mock.patch.object(native, "cuda_module", loaded), races.variables(BLOCKS=0):
        cases()[0].make().ours()  # imports what all runs need
    for case, call, barrier in runs():
        process = os.fork()
        if process == 0:
            with mock.patch.object(native, "cuda_module", loaded):
                _end_with(call.run, BLOCKS=MOST_BLOCKS, WITHOUT=barrier or None)
        if os.waitpid(process, 0)[1]:
            raise RuntimeError(f"{case} without {barrier or 'nothing'} did not end well")
        print(json.dumps([str(case), barrier, process]), flush=True)


def _end_with(call: Callable[[], object], **values: object) -> NoReturn:
    """Ends this process with a call."""
    status = 1
    try:
        with races.variables(**values):
            call()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# ---- Both opinions


def of_faults(folder: Path) -> dict[str, tuple[Pairs, Pairs]]:
    """By kernel of FAULTS."""
    ours, theirs = (emulated.compile_program(FAULTS, folder, watch=watch) for watch in ("races", "libtsan"))
    found = {}
    for name in planted():
        told = subprocess.run([ours, name], capture_output=True, text=True, check=True).stdout
        said(under_libtsan([theirs, name], folder / name), folder / name)
        log = "".join(file.read_text() for file in folder.glob(f"{name}.[0-9]*"))
        found[name] = told_by_races(races.readable(told, ours)), told_by_libtsan(log, theirs)
    return found


def of_kernels(folder: Path) -> dict[Key, tuple[Pairs, Pairs]]:
    """By case and barrier that is switched off. The two detectors run beside each other."""
    os.environ[races.MODULE], module = str(emulated.build(watch="races")), emulated.build(watch="libtsan")
    library = subprocess.check_output(["c++", "-print-file-name=libtsan.so"], text=True).strip()
    command, log = [sys.executable, "-m", "tests.libtsan", "--run", module], folder / "log"
    process = under_libtsan(command, log, LD_PRELOAD=library)
    try:
        ours = of_races()
        theirs = of_libtsan(said(process, log), log, module)
    finally:
        process.kill()
    return {key: (ours[key], theirs[key]) for key in ours}


def row(opinions: list[tuple[Pairs, Pairs]]) -> dict[str, Any]:
    """How many cases each reports, and in how many they differ; the pairs of lines of both, and of one alone."""
    ours, theirs = (set().union(*pairs) for pairs in zip(*opinions))
    return {
        "cases": len(opinions),
        "races": sum(bool(one) for one, _ in opinions),
        "libtsan": sum(bool(other) for _, other in opinions),
        "differ": sum(bool(one) != bool(other) for one, other in opinions),
        "pairs": [len(ours & theirs), len(ours - theirs), len(theirs - ours)],
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        faults, kernels = of_faults(Path(folder)), of_kernels(Path(folder))
    return {
        "compiler": subprocess.check_output(["c++", "--version"], text=True).splitlines()[0],
        "barriers": {
            barrier: row([both for (_, without), both in kernels.items() if without == barrier])
            for barrier in ("", *barriers())
        },
        "faults": {name: row([both]) for name, both in faults.items()},
    }


# ---- The record and its page

FILE = Path(__file__).with_suffix(".json")
PAGE = emulated.ROOT / "docs" / "emulator.md"
_MARKS = re.compile(r"(<!-- libtsan: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

# Why one reports what the other does not; barriers by their files.
REASONS = {
    "ms_deform_attn/device.cuh": "every kernel has it; the detector ends a call at the first launch with a race",
    **dict.fromkeys(
        ("the_wait_of_another_group", "shared_memory_that_nothing_has_written"),
        "libtsan cannot tell that nothing has written what is read",
    ),
}


def committed() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def reason(name: str) -> str:
    return REASONS.get(name.split(":")[0], "")


def differs(one: dict[str, Any]) -> bool:
    return one["differ"] > 0 or any(one["pairs"][1:])


def _table(heading: str, rows: dict[str, dict[str, Any]]) -> str:
    names = "cases | the detector | libtsan | pairs of lines: both | the detector alone | libtsan alone | why"
    lines = [f"| {heading} | {names} |", "|---|--:|--:|--:|--:|--:|--:|---|"]
    for name, one in rows.items():
        cells = (one["cases"], one["races"], one["libtsan"], *one["pairs"], reason(name))
        lines.append(f"| {f'`{name}`' if name else 'none'} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def drawn(known: dict[str, Any]) -> str:
    """The page with the tables of a record."""
    tables = {"barriers": _table("without", known["barriers"]), "faults": _table("kernel", known["faults"])}
    text, count = _MARKS.subn(lambda mark: f"{mark[1]}\n{tables[mark[2]]}\n\n{mark[3]}", PAGE.read_text())
    if count != len(tables):
        raise ValueError(f"{PAGE} has not one place for each table")
    return text


def rows(known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By barrier and fault."""
    return {**known["barriers"], **known["faults"]}


def problems(known: dict[str, Any]) -> list[str]:
    """The objections that a record has to a detector, or to a barrier."""
    found = []
    for name, one in rows(known).items():
        if (one["races"] > 0) != (name not in ("", "fine")):
            found.append(f"{name or OP}: the race detector reports {one['races']} of {one['cases']}")
        if differs(one) and not reason(name):
            found.append(f"{name or OP}: libtsan does not report the same, for no known reason")
    return found


def verdicts(known: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A record without its pairs of lines, which depend on the compiler."""
    return {
        name: tuple(one[what] for what in ("cases", "races", "libtsan", "differ"))
        for name, one in rows(known).items()
    }


def main(check: bool) -> int:
    found = measure()
    told = problems(found)
    if check and verdicts(found) != verdicts(committed()):
        told.append(f"the verdicts are others than in {FILE.name}: {verdicts(found)}")
    if not check:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(drawn(found))
    print("\n".join(told) or f"no difference without a reason, by {found['compiler']}")
    return 1 if told else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.libtsan", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a verdict differs")
    parser.add_argument("--run", type=Path, metavar="MODULE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.exit(run(options.run) if options.run else main(options.check))
