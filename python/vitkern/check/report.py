# SPDX-License-Identifier: Apache-2.0
"""The results: the table of errors, each failure with the command that repeats it, and JUnit's XML."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from vitkern.check.examine import Outcome
from vitkern.check.plan import Request, Task
from vitkern.check.routes import EMULATED
from vitkern.commands.errors import INTERRUPTED, CommandError
from vitkern.commands.texts import readable


def conclude(
    checks: Iterable[Outcome],
    left_out: Sequence[tuple[str, str]],
    request: Request,
    junit: Path | None,
    *,
    limit: float,
) -> int:
    """Waits for the checks and prints the results. Returns the exit status: 1 if one failed, 130 after Ctrl-C."""
    started = time.monotonic()
    outcomes, interrupted = _until_interrupted(checks)
    seconds = time.monotonic() - started
    if interrupted:
        left_out = [*left_out, ("the checks that follow", "interrupted")]
    unit = f"in units of plain torch's own error in the same dtype ({limit:g} is the limit)"
    print(f"The largest error of all cases, {unit}:")
    print(readable("\n".join(table(outcomes))))
    print_left_out(left_out)
    failed = [outcome for outcome in outcomes if outcome.failures]
    for outcome in failed:
        print(readable("\n".join(failure_lines(outcome, request))))
    print(f"{len(outcomes)} checks in {seconds:.0f} s, {len(failed)} FAILED")
    if junit is not None:
        write_junit(junit, outcomes, left_out, request)
    return INTERRUPTED if interrupted else int(bool(failed))


def _until_interrupted(checks: Iterable[Outcome]) -> tuple[list[Outcome], bool]:
    """The finished checks, which Ctrl-C must not lose, and whether Ctrl-C came."""
    outcomes = []
    try:
        for outcome in checks:
            outcomes.append(outcome)
    except KeyboardInterrupt:
        return outcomes, True
    return outcomes, False


def print_left_out(left_out: Sequence[tuple[str, str]]) -> None:
    if left_out:
        print("Not run:")
    for what, reason in left_out:
        print(f"  {what}: {reason}")


def table(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for each op, backend and dtype: the number of checks, and the largest ratio of each result."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        task = outcome.task
        groups.setdefault((task.op, task.route.name, task.dtype), []).append(outcome)
    width = max((len(route) for _, route, _ in groups), default=0) + 2
    lines = [f"{'op':<22}{'backend':<{width}}{'dtype':<7}{'checks':>6}{'failed':>8}  errors"]
    for (op, route, dtype), members in sorted(groups.items()):
        worst: dict[str, float] = {}
        for outcome in members:
            for name, ratio in outcome.ratios.items():
                worst[name] = max(worst.get(name, 0.0), ratio)
        errors = "  ".join(
            f"{name.removeprefix('gradient of ')} {ratio:.2g}" for name, ratio in worst.items()
        )
        failed = sum(bool(outcome.failures) for outcome in members)
        lines.append(
            f"{op:<22}{route:<{width}}{dtype:<7}{len(members):>6}{failed or '-':>8}  {errors or '-'}"
        )
    return lines


def command(task: Task, request: Request) -> str:
    """The command that repeats one check, to be pasted into a shell."""
    one = replace(request, cases=[task.case], dtypes=[task.dtype], quick=False)
    if request.module is None:
        one = replace(one, ops=[task.op], backends=[task.route.name], kinds=[task.kind])
    words = ["vitkern", "check", *one.words()]
    variable = f"{EMULATED}={os.environ.get(EMULATED, '')}" if task.route.name == "cuda-emulated" else ""
    return shlex.join([variable, *words] if variable else words)


def failure_lines(outcome: Outcome, request: Request) -> list[str]:
    task = outcome.task
    where = f"{task.op} on {task.route.name} in {task.dtype}, {task.kind} of case {task.case}"
    return [
        *(f"FAILED {where}: {failure}" for failure in outcome.failures),
        f"  repeat: {command(task, request)}",
    ]


def write_junit(
    path: Path,
    outcomes: Sequence[Outcome],
    left_out: Sequence[tuple[str, str]],
    request: Request,
) -> None:
    suite = ElementTree.Element(
        "testsuite",
        name="vitkern check",
        tests=str(len(outcomes) + len(left_out)),
        failures=str(sum(bool(outcome.failures) for outcome in outcomes)),
        errors="0",
        skipped=str(len(left_out)),
        time=f"{sum(outcome.seconds for outcome in outcomes):.3f}",
    )
    for outcome in outcomes:
        task = outcome.task
        test = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"{task.op}.{task.route.name}",
            name=f"{task.kind}[{task.dtype}-{task.case}-{task.seed}]",
            time=f"{outcome.seconds:.3f}",
        )
        if outcome.failures:
            failure = ElementTree.SubElement(test, "failure", message="; ".join(outcome.failures))
            failure.text = "\n".join(failure_lines(outcome, request))
    for what, reason in left_out:
        test = ElementTree.SubElement(suite, "testcase", classname="left out", name=what, time="0")
        ElementTree.SubElement(test, "skipped", message=reason)
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    for element in whole.iter():  # messages of compilers have colours, which XML does not allow
        element.text = element.text and readable(element.text)
        element.attrib.update({name: readable(text) for name, text in element.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(whole).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from None
