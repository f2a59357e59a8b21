# SPDX-License-Identifier: Apache-2.0
"""Checks in a process of their own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vitkern.check.examine import Outcome
from vitkern.check.plan import Request, Task
from vitkern.check.routes import INTERPRET


class Apart:
    """The tasks run beside those of this process, from here to the end of the block."""

    def __init__(self, tasks: Sequence[Task], request: Request) -> None:
        self.tasks = tasks
        self.folder = tempfile.TemporaryDirectory(prefix="vitkern-check-")
        self.path = Path(self.folder.name) / "outcomes"
        same = dataclasses.asdict(request) | {"backends": sorted({task.route.name for task in tasks})}
        code = "import sys; from vitkern.check.apart import work; work(*sys.argv[1:])"
        with (Path(self.folder.name) / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(same), str(self.path)],
                env={**os.environ, INTERPRET: "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def wait(self) -> int:
        return self.process.wait()

    def heard(self) -> list[Outcome]:
        """Of the tasks that are done so far."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        tasks = {task.key: task for task in self.tasks}
        return [
            Outcome(tasks[tuple(line["key"])], line["seconds"], line["ratios"], line["failures"])
            for line in told
        ]

    def outcomes(self) -> list[Outcome]:
        """Of all tasks: one of which nothing was heard has failed."""
        status, heard = self.wait(), self.heard()
        log = (Path(self.folder.name) / "log").read_text(errors="replace").strip().splitlines()
        failure = f"its process ended with {status}: {log[-1] if log else 'it said nothing'}"
        done = {outcome.task.key for outcome in heard}
        return heard + [Outcome(task, failures=[failure]) for task in self.tasks if task.key not in done]


def work(arguments: str, path: str) -> None:
    """The other side."""
    from vitkern.check.examine import examine
    from vitkern.check.plan import plan

    request = Request(**json.loads(arguments))
    with Path(path).open("w") as file:
        for task in plan(request).tasks:
            outcome = examine(task, request.times)
            line = {
                "key": task.key,
                "seconds": outcome.seconds,
                "ratios": outcome.ratios,
                "failures": outcome.failures,
            }
            print(json.dumps(line), file=file, flush=True)
