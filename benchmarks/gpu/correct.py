# SPDX-License-Identifier: Apache-2.0
"""PART=correct and PART=sanitize: a list of commands; those that passed at this commit do not run again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import resume
from benchmarks.gpu.common import DONE, FAILED, LEFT, ROOT, Budget
from vitkern.cases.ops import OPS
from vitkern.check import sanitize
from vitkern.commands.errors import CommandError

ROUTES = ("cuda-gpu", "triton-gpu")
CHECK = ("check", "--device", "cuda")
LEAST_SECONDS = 20.0  # below, no command is begun
GRACE = 15.0  # that tests stop before the limit, so that pytest can say what came out


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False  # a run of pytest, which goes on by itself

    def in_words(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(
            [*variables, *("python" if word == sys.executable else word for word in self.command)]
        )


def vitkern(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "vitkern", *arguments


def tests(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "pytest", "-m", "gpu", *arguments


def correct() -> list[Step]:
    """The steps: doctor; every test that needs a card; outputs, gradients and repeatability of each op and backend."""
    checks = [
        Step(f"check {op} {route}", vitkern(*CHECK, "--op", op, "--backend", route))
        for op in OPS
        for route in ROUTES
    ]
    return [Step("doctor", vitkern("doctor")), Step("tests", tests("-q"), resumes=True), *checks]


def sanitized() -> list[Step]:
    """Each tool on the quick cases, with and without deterministic mode; finite differences would take hours."""
    kinds = ("--kind", "oracle", "--kind", "repeat")
    cases = {op: [f"--case={name}" for name in OPS[op].quick] for op in OPS}
    return [
        Step(
            f"{tool} {op} {route}",
            tuple(
                sanitize.command(
                    tool, [*CHECK, "--quick", "--op", op, "--backend", route, *kinds, *cases[op]]
                )
            ),
            sanitize.ENVIRONMENT,
        )
        for tool in sanitize.TOOLS
        for op in OPS
        for route in ROUTES
    ]


def demand_the_sanitizer() -> None:
    if shutil.which("compute-sanitizer") is None:
        raise CommandError("PART=sanitize needs compute-sanitizer of the CUDA toolkit in PATH")


def listing(steps: Sequence[Step]) -> None:
    """The commands, and the tests that pytest finds for them here."""
    for step in steps:
        print(step.in_words())
    if any(step.resumes for step in steps):
        print("\nThe tests:", flush=True)
        done = subprocess.run(
            tests("--collect-only", "-q", "--no-summary"), cwd=ROOT, capture_output=True, text=True
        )
        print(done.stdout, end="")
        if done.returncode:
            raise CommandError(f"pytest could not collect the tests: {done.stderr.strip() or 'see above'}")


def run(steps: Sequence[Step], folder: Path, budget: Budget) -> int:
    """Runs the steps. `folder` keeps the outcomes for the next call."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "steps.json"
    outcomes: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    # Failed steps come last, so that the others run before them.
    for step in sorted(steps, key=lambda step: outcomes.get(step.name, "").startswith("FAILED")):
        if outcomes.get(step.name) == "passed":
            print(f"{step.name}: passed before")
        elif budget.left() >= LEAST_SECONDS:
            print(f"\n{step.name}: {step.in_words()}", flush=True)
            outcomes[step.name] = _outcome(step, folder, budget)
            print(f"{step.name}: {outcomes[step.name]}", flush=True)
            path.write_text(json.dumps(outcomes, indent=1))
    return _verdict(steps, outcomes)


def _verdict(steps: Sequence[Step], outcomes: Mapping[str, str]) -> int:
    failed = [step for step in steps if outcomes.get(step.name, "").startswith("FAILED")]
    left = [step for step in steps if not outcomes.get(step.name, "left").startswith(("passed", "FAILED"))]
    print(f"\n{len(steps)} steps, {len(failed)} FAILED, {len(left)} left")
    for step in failed:
        print(f"{outcomes[step.name]}: {step.in_words()}")
    if left:
        print(f"Call again to go on with: {', '.join(step.name for step in left)}")
    return FAILED if failed else LEFT if left else DONE


def _outcome(step: Step, folder: Path, budget: Budget) -> str:
    """ "passed", "left" with the missing part, or "FAILED" with the reason."""
    limit = budget.left()
    if step.resumes:
        return _outcome_of_tests(step, folder / "tests.jsonl", limit)
    status = _status(step, step.command, limit)
    if status is None and limit > 0.9 * budget.seconds:
        return f"FAILED: it takes more than the {limit:.0f} s that it had"
    if status is None:
        return f"left: it had {limit:.0f} s, and has a whole run when it comes first"
    return "passed" if status == 0 else f"FAILED with {status}"


def _outcome_of_tests(step: Step, log: Path, limit: float) -> str:
    """The outcome by the log of all calls; pytest's own status covers this call only."""
    until = time.time() + limit - GRACE
    options = ("-p", "benchmarks.gpu.resume", "--outcomes", str(log), "--until", str(until))
    status = _status(step, (*step.command, *options), limit)
    found = resume.read(log)
    failed = sum(outcome == "failed" for outcome in found.values())
    left = resume.collected(log) - len(found)
    if failed and left <= 0:
        return f"FAILED in {failed} of {len(found)} tests"
    if left > 0:
        return f"left: {left} of {resume.collected(log)} tests, {failed} of the others FAILED"
    # 5: every test has passed before. 2: stopped after the last.
    return "passed" if found and status in (0, 2, 5, None) else f"FAILED with {status}"


def _status(step: Step, command: Sequence[str], limit: float) -> int | None:
    """The command's exit status; None if it and its child processes were stopped because the time was over."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **step.environment}, start_new_session=True
    )
    try:
        return process.wait(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise
