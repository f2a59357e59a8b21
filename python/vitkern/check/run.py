# SPDX-License-Identifier: Apache-2.0
"""`vitkern check`: runs the planned checks and prints the results."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vitkern.check import report
from vitkern.check.examine import Outcome, examine
from vitkern.check.plan import Request, Task, plan
from vitkern.check.routes import INTERPRET
from vitkern.check.worker import Worker
from vitkern.commands.errors import CommandError
from vitkern.commands.progress import Progress


def run(request: Request, *, junit: Path | None = None, only_list: bool = False) -> int:
    """Returns the exit status: 1 if a check failed."""
    planned = plan(request)
    if only_list:
        for task in planned.tasks:
            print(report.command(task, request))
        report.print_left_out(planned.left_out)
        return 0
    if not planned.tasks:
        raise CommandError(
            "no check matches the request; --list shows all checks, and the reasons why some cannot run here"
        )
    if torch.cuda.is_available():
        # cuBLAS, which the reference calls on a GPU, repeats its bits only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    checks = _checks(planned.tasks, request)
    return report.conclude(checks, planned.left_out, request, junit, limit=request.times)


def _checks(tasks: Sequence[Task], request: Request) -> Iterator[Outcome]:
    """Each outcome when it is ready; those of the other process come at the end."""
    here = [task for task in tasks if not task.route.own_process]
    separate = [task for task in tasks if task.route.own_process]
    if not separate:
        yield from _checks_here(here, request.times)
        return
    same = replace(request, backends=sorted({task.route.name for task in separate}))
    with Worker(separate, same, environment={INTERPRET: "1"}, silent=True) as other:
        try:
            yield from _checks_here(here, request.times)
        except KeyboardInterrupt:
            yield from other.heard()
            raise
        yield from other.all()


def _checks_here(tasks: Sequence[Task], times: float) -> Iterator[Outcome]:
    groups = [list(group) for _, group in itertools.groupby(tasks, lambda task: (task.op, task.case))]
    with Progress(len(groups)) as progress:
        for group in groups:
            progress.step(f"{group[0].op} {group[0].case}")
            yield from (examine(task, times) for task in group)
