# SPDX-License-Identifier: Apache-2.0
"""`vitkern check`: runs what was planned and says what came out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vitkern.bench.progress import Progress
from vitkern.check import report
from vitkern.check.apart import Apart
from vitkern.check.compare import TIMES
from vitkern.check.examine import Outcome, examine
from vitkern.check.plan import Plan, Request, Task, plan


def run(request: Request, *, junit: Path | None = None, times: float = TIMES, only_list: bool = False) -> int:
    """Returns what the process is to exit with: 1 if a check failed."""
    planned = plan(request)
    if only_list:
        for task in planned.tasks:
            print(report.command(task, request))
        _print_left_out(planned.left_out)
        return 0
    started = time.monotonic()
    with _repeatable_products():
        outcomes = check(planned, request, times)
    print(report.HEADING)
    print("\n".join(report.table(outcomes)))
    _print_left_out(planned.left_out)
    failed = [outcome for outcome in outcomes if outcome.failures]
    for outcome in failed:
        print("\n".join(report.failure_lines(outcome, request)))
    if junit is not None:
        report.write_junit(junit, outcomes, planned.left_out, request)
    print(f"{len(outcomes)} checks in {time.monotonic() - started:.0f} s, {len(failed)} FAILED")
    return int(bool(failed))


def check(planned: Plan, request: Request, times: float = TIMES) -> list[Outcome]:
    apart = [task for task in planned.tasks if task.route.apart]
    other = Apart(apart, request, times) if apart else None
    try:
        outcomes = _check_here([task for task in planned.tasks if not task.route.apart], times)
        return outcomes + (other.outcomes() if other else [])
    except BaseException:
        if other is not None:
            other.stop()
        raise


def _check_here(tasks: Sequence[Task], times: float) -> list[Outcome]:
    ops = list(dict.fromkeys(task.op for task in tasks))
    outcomes = []
    with Progress(len(ops)) as progress:
        for op in ops:
            progress.step(op)
            outcomes += [examine(task, times) for task in tasks if task.op == op]
    return outcomes


def _print_left_out(left_out: Sequence[tuple[str, str]]) -> None:
    if left_out:
        print("Not run:")
    for what, reason in left_out:
        print(f"  {what}: {reason}")


@contextlib.contextmanager
def _repeatable_products() -> Iterator[None]:
    """cuBLAS, which the reference uses on a GPU, repeats its bits only with a workspace of fixed size."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
