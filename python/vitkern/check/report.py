# SPDX-License-Identifier: Apache-2.0
"""What came out: the table of errors, each failure with the command that repeats it, and JUnit's XML."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from vitkern.check.examine import Outcome
from vitkern.check.plan import Request, Task
from vitkern.check.routes import EMULATED

HEADING = (
    "The greatest error of all cases, in units of plain torch's own error in the same dtype (2 is the limit):"
)


def table(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for each op, backend and dtype: how many checks, and the greatest ratio of each result."""
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


def command(task: Task, request: Request, module: str | None = None) -> str:
    """What repeats one check, of the kernels or of a module of the user's, to be pasted into a shell."""
    words = ["vitkern", "check"]
    options = {
        "module": module,
        "op": None if module else task.op,
        "backend": None if module else task.route.name,
        "dtype": task.dtype,
        "case": task.case,
        "kind": None if module else task.kind,
        "seed": task.seed,
        "device": request.device,
    }
    for name, option in options.items():
        words += [] if option is None else [f"--{name}", str(option)]
    variable = f"{EMULATED}={os.environ.get(EMULATED, '')}" if task.route.name == "cuda-emulated" else ""
    return shlex.join([variable, *words] if variable else words)


def failure_lines(outcome: Outcome, request: Request, module: str | None = None) -> list[str]:
    task = outcome.task
    where = f"{task.op} on {task.route.name} in {task.dtype}, {task.kind} of case {task.case}"
    return [
        *(f"FAILED {where}: {failure}" for failure in outcome.failures),
        f"  repeat: {command(task, request, module)}",
    ]


def write_junit(
    path: Path,
    outcomes: Sequence[Outcome],
    left_out: Sequence[tuple[str, str]],
    request: Request,
    module: str | None = None,
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
            failure.text = "\n".join(failure_lines(outcome, request, module))
    for what, reason in left_out:
        test = ElementTree.SubElement(suite, "testcase", classname="left out", name=what, time="0")
        ElementTree.SubElement(test, "skipped", message=reason)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.ElementTree(whole).write(path, encoding="utf-8", xml_declaration=True)
