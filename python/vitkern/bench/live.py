# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench compare --live`: two builds take turns, each in a process of its own, under the same conditions."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vitkern
from vitkern.bench import store
from vitkern.bench.compare import HEADING, Compared, summary
from vitkern.bench.plan import Request, plan
from vitkern.bench.verdicts import factor_of_pairs, moved
from vitkern.commands.errors import CommandError
from vitkern.commands.progress import Progress

HARNESS = str(Path(vitkern.__file__).parent)
Pairs = list[tuple[float, float]]  # milliseconds of A and B in a round
Clocks = dict[tuple[Any, ...], list[float]]  # of a card, in all samples of a row


@dataclass(frozen=True)
class Build:
    """An interpreter, and the folder with vitkern if it is not where the interpreter usually finds it."""

    name: str
    interpreter: str
    folder: str | None = None

    @classmethod
    def at(cls, name: str, path: str) -> Build:
        """An interpreter, an environment that has one, or a folder that holds the package, for this interpreter."""
        where = Path(path)
        if where.is_file() and os.access(where, os.X_OK):
            return cls(name, str(where.absolute()))
        for interpreter in (where / "bin" / "python", where / "Scripts" / "python.exe"):
            if interpreter.exists():
                return cls(name, str(interpreter.absolute()))
        if (where / "vitkern" / "__init__.py").exists():
            return cls(name, sys.executable, str(where.absolute()))
        raise CommandError(
            f"{name}, {path}, is not a build: it must be a Python interpreter, an environment with one, or a folder "
            "that holds an installed vitkern, such as site-packages"
        )


class Process:
    """A live_worker process: questions and answers are lines of JSON."""

    def __init__(self, build: Build) -> None:
        self.build = build
        command = [build.interpreter, str(Path(__file__).with_name("live_worker.py")), HARNESS]
        command += [build.folder] if build.folder else []
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError:
            raise self._no_python() from None

    def _no_python(self) -> CommandError:
        return CommandError(f"{self.build.name}, {self.build.interpreter}, is no Python interpreter")

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and so has its output
            print(json.dumps({"do": do, **question}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise CommandError(f"the process of {self.build.name} ended; what it said stands above")
        try:
            return dict(json.loads(answer))
        except json.JSONDecodeError:
            raise self._no_python() from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare_builds(
    path_a: str, path_b: str, request: Request, *, launches: int, rounds: int, smallest: float
) -> list[Compared]:
    """Prints and returns the verdicts; after an interruption, those on the rounds so far."""
    for option, count in (("--launches", launches), ("--rounds", rounds)):
        if count < 1:
            raise CommandError(f"{option} must be at least 1, got {count}")
    builds = Build.at("A", path_a), Build.at("B", path_b)
    keys = _keys(request)
    taken: dict[tuple[Any, ...], list[Pairs]] = {key: [] for key in keys}
    reasons: dict[tuple[Any, ...], str] = {}
    clocks: Clocks = {key: [] for key in keys}
    with Progress(launches * len(keys)) as progress:
        try:
            for launch in range(launches):
                _launch(builds, keys, rounds, launch == 0, taken, clocks, reasons, progress)
        except KeyboardInterrupt:
            print("interrupted: verdicts on what was measured")
    compared = [_compared(key, reasons.get(key), taken[key], clocks[key], smallest) for key in keys]
    print(HEADING)
    for row in compared:
        print(row.line())
    print(summary(compared))
    return compared


def _keys(request: Request) -> list[tuple[Any, ...]]:
    """The keys of the rows of vitkern's own backends; plain torch is the same in both."""
    keys = []
    for subject in plan(request):
        for what in subject.passes:
            for backend in subject.backends:
                if backend != "torch" or "torch" in request.backends:
                    keys.append(store.key(subject.key | {"pass": what, "backend": backend}))
    return keys


def _launch(
    builds: Sequence[Build],
    keys: Sequence[tuple[Any, ...]],
    rounds: int,
    is_first: bool,
    taken: dict[tuple[Any, ...], list[Pairs]],
    clocks: Clocks,
    reasons: dict[tuple[Any, ...], str],
    progress: Progress,
) -> None:
    """Measures every row once in two new processes."""
    processes = [Process(build) for build in builds]
    try:
        for process in processes:
            found = process.ask("hello", threads=torch.get_num_threads())
            if is_first:
                print(f"{process.build.name}: {found['words']}, from {found['compiled']}")
        for key in keys:
            progress.step(f"{key[0]} {key[1]}: {key[5]}")
            if key not in reasons:
                reason = _open(processes, key, check=is_first)
                if isinstance(reason, str):
                    reasons[key] = reason
                else:
                    taken[key].append(_rounds(processes, rounds, reason, clocks[key]))
    finally:
        for process in processes:
            process.close()


def _open(processes: Sequence[Process], key: tuple[Any, ...], *, check: bool) -> str | int:
    """The reason why one of the two cannot be timed, or the number of calls of a sample, the same in both."""
    answers = [process.ask("open", key=key, check=check) for process in processes]
    for process, answer in zip(processes, answers):
        if answer["reason"] is not None:
            return f"FAILED in {process.build.name}: {answer['reason']}"
    return max(answer["calls"] for answer in answers)


def _rounds(processes: Sequence[Process], rounds: int, calls: int, clocks: list[float]) -> Pairs:
    """Times A B B A, then B A A B: steady growth or decline adds the same to both. Adds to `clocks` on a card."""
    pairs = []
    for count in range(rounds):
        times: tuple[list[float], list[float]] = ([], [])
        for which in (0, 1, 1, 0) if count % 2 == 0 else (1, 0, 0, 1):
            answer = processes[which].ask("sample", calls=calls)
            times[which].append(answer["milliseconds"])
            clocks += [clock] if (clock := answer.get("megahertz")) else []
        pairs.append((min(times[0]), min(times[1])))
    return pairs


def _compared(
    key: tuple[Any, ...], reason: str | None, launches: list[Pairs], clocks: list[float], smallest: float
) -> Compared:
    if reason is not None or not launches:
        return Compared(key, reason or "not measured")
    factor = factor_of_pairs(launches)
    middles = [statistics.median(pair[which] for pairs in launches for pair in pairs) for which in (0, 1)]
    return Compared(key, factor.verdict(smallest, moved(clocks)), (middles[0], middles[1]), factor)
