# SPDX-License-Identifier: Apache-2.0
"""Runs of pytest in the copy: the record of a test file, and the tests of a mutation until one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.mutating.reach import write_json
from tools.mutating.workplace import Workplace

_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark")
_PYTEST += ("-p", "_mutate_reach")
_NOT_FAILED = (0, 5)  # pytest's statuses: all passed, no tests


class Verdict(NamedTuple):
    caught: bool
    by: str  # the test that failed
    why: str  # its last line, or how the process ended
    ran: int
    left: int  # tests that the time did not suffice for
    seconds: float


class _Process:
    """A run of pytest with everything that it starts."""

    def __init__(self, place: Workplace, arguments: Sequence[str], log: Path, **variables: str) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [place.python, *_PYTEST, *arguments],
                cwd=place.tree,
                env={**place.environment, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # in this session, whose priority it keeps
            )

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def record(
    place: Workplace, tests: Sequence[tuple[str, Path]], seconds: float, say: Any, **variables: str
) -> None:
    """Writes the record of each test file, several at a time. Tests after `seconds` of processor time are left out."""
    waiting = list(tests)
    running: dict[str, tuple[_Process, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < place.processes:
                file, path = waiting.pop(0)
                own = {
                    "MUTATE_RECORD": str(path),
                    "MUTATE_FOLDER": str(place.tree),
                    "MUTATE_SECONDS": str(seconds),
                }
                arguments, log = [file, "-m", "not alone", "-k", "not cpu-wide"], path.with_suffix(".log")
                running[file] = _Process(place, arguments, log, **own, **variables), time.monotonic()
            for file, (process, began) in list(running.items()):
                over = time.monotonic() - began > 20 * seconds + 60
                if process.process.poll() is not None or over:
                    process.kill()
                    del running[file]
                    say(f"{file}: {time.monotonic() - began:.0f} s{' (stopped)' if over else ''}")
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.kill()


def run(
    place: Workplace, tests: Sequence[str], limit: float, expected: dict[str, float], **variables: str
) -> Verdict:
    """Runs tests in several processes, alternating between their files, until one fails or the time is over."""
    files = list(dict.fromkeys(node.split("::")[0] for node in tests))
    turns = [set(files[turn :: place.processes]) for turn in range(min(place.processes, len(files)))]
    chosen = [[node for node in tests if node.split("::")[0] in own] for own in turns]
    return _first_failure(
        [_Run(place, turn, own, variables) for turn, own in enumerate(chosen)], limit, expected
    )


def run_files(place: Workplace, files: Sequence[str], words: str, limit: float, **variables: str) -> Verdict:
    """Runs the tests of each file that match `words`, an expression for -k, even if the record lacks them."""
    options = ("-m", "", "-k", words)
    return _first_failure(
        [_Run(place, turn, file, variables, options) for turn, file in enumerate(files)], limit, {}
    )


def _first_failure(runs: Sequence[_Run], limit: float, expected: dict[str, float]) -> Verdict:
    began, found = time.monotonic(), None
    try:
        while time.monotonic() - began < limit:
            ended = [run.ended() for run in runs]
            found = next((each for each in ended if each is not None and each[0]), None)
            if found is not None or all(each is not None for each in ended):
                break
            time.sleep(0.05)
        else:
            found = next((hanging for run in runs if (hanging := run.hangs(expected))), None)
        left = sum(len(run.tests) - run.told().get("done", 0) for run in runs if run.ended() is None)
    finally:
        for each in runs:
            each.process.kill()
    ran = sum(each.told().get("done", 0) for each in runs)
    _, by, why = found or (False, "", "")
    return Verdict(found is not None, by, why, ran, left, round(time.monotonic() - began, 1))


class _Run:
    """One of the processes that run a mutation's tests."""

    def __init__(
        self,
        place: Workplace,
        turn: int,
        tests: Sequence[str] | str,
        variables: dict[str, str],
        options: Sequence[str] = (),
    ) -> None:
        self.tests = [] if isinstance(tests, str) else tests
        chosen, self.result = place.root / f"tests-{turn}.json", place.root / f"result-{turn}.json"
        write_json(chosen, None if isinstance(tests, str) else tests)
        self.result.unlink(missing_ok=True)
        files = (
            [tests] if isinstance(tests, str) else list(dict.fromkeys(node.split("::")[0] for node in tests))
        )
        own = {"MUTATE_TESTS": str(chosen), "MUTATE_RESULT": str(self.result)}
        log = place.root / f"log-{turn}.txt"
        self.process = _Process(place, ["-x", *options, *files], log, **own, **variables)

    def told(self) -> dict[str, Any]:
        try:
            return json.loads(self.result.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def ended(self) -> tuple[bool, str, str] | None:
        """Whether the run failed, in which test and how; None while it runs."""
        status = self.process.process.poll()
        if status is None:
            return None
        if status in _NOT_FAILED:
            return False, "", ""
        told = self.told()
        if told.get("what") == "failed":
            return True, told["test"], told["why"][:200]
        lines = self.process.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = signal.Signals(-status).name if status < 0 else (lines or [""])[-1][:200]
        return True, told.get("test", "when the tests start"), how

    def hangs(self, expected: dict[str, float]) -> tuple[bool, str, str] | None:
        """The test that takes much longer than recorded, or None."""
        told = self.told()
        took = time.time() - told.get("since", time.time())
        usual = expected.get(told.get("test", ""), 10.0)
        if self.ended() is None and told.get("what") == "runs" and took > max(60.0, 20 * usual):
            return True, told["test"], f"it has not ended after {took:.0f} s"
        return None
