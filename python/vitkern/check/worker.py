# SPDX-License-Identifier: Apache-2.0
"""Checks in a process of their own, which may end in any way: tasks without an outcome have failed.

Triton decides on import whether it interprets kernels, and a user's code can end its process.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitkern.check.examine import Outcome, examine
from vitkern.check.plan import Request, Task, plan
from vitkern.commands.errors import CommandError

# Ctrl-C is for the parent process, which ends this one.
_START = """
import sys
sys.path[:] = filter(None, sys.path)  # a file of the working folder is no module of Python's
import json, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from vitkern.check.worker import work
work(*sys.argv[2:])
"""


class Worker:
    """Runs the tasks beside those of this process until the end of the block.

    `source` is the module whose ``examined(request)`` yields the outcomes, in the order of the tasks. A `silent`
    process prints nothing; only its last line is reported if it fails.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        request: Request,
        source: str = __name__,
        *,
        environment: Mapping[str, str] | None = None,
        silent: bool = False,
    ) -> None:
        self.tasks = tasks
        self.folder = tempfile.TemporaryDirectory(prefix="vitkern-check-")
        self.path, self.log = (Path(self.folder.name) / name for name in ("told", "log"))
        told = [json.dumps(part) for part in ([*map(str, sys.path)], dataclasses.asdict(request))]
        # A crash loses no output, and a traceback is printed.
        python = [sys.executable, *(() if silent else ("-u", "-X", "faulthandler"))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*python, "-c", _START, *told, source, str(self.path)],
                env={**os.environ, **(environment or {})},
                stdout=log if silent else None,
                stderr=subprocess.STDOUT if silent else None,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def wait(self) -> int:
        return self.process.wait()

    def heard(self) -> list[Outcome]:
        """The outcomes of the tasks done so far. A request that was refused there is refused here."""
        tasks = {task.key: task for task in self.tasks}
        outcomes = []
        for line in self._told():
            if "refused" in line:
                raise CommandError(line["refused"])
            outcomes.append(Outcome(tasks[tuple(line.pop("key"))], **line))
        return outcomes

    def _told(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def outcomes(self) -> list[Outcome]:
        """The outcomes of all tasks; a task without a message has failed."""
        how, heard = _in_words(self.wait()), self.heard()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        failure = f"its process ended with {how}{f': {lines[-1]}' if lines else ''}"
        done = {outcome.task.key for outcome in heard}
        left = [task for task in self.tasks if task.key not in done]
        if left:
            heard.append(Outcome(left[0], failures=[f"{failure}, before this check was done"]))
            heard += [Outcome(task, failures=["not checked: its process had ended"]) for task in left[1:]]
        elif self.process.returncode and heard:
            heard[-1].failures.append(f"{failure}, after the last check")
        return heard

    def all(self) -> Iterator[Outcome]:
        """The outcomes, once the process has ended; after Ctrl-C, those so far."""
        try:
            self.wait()
        except KeyboardInterrupt:
            yield from self.heard()
            raise
        yield from self.outcomes()


def _in_words(status: int) -> str:
    """The exit status, or the name of the signal, which subprocess gives as a negative number."""
    try:
        return signal.Signals(-status).name if status < 0 else str(status)
    except ValueError:
        return str(status)


def examined(request: Request) -> Iterator[Outcome]:
    return (examine(task, request.times) for task in plan(request).tasks)


def work(request: str, source: str, path: str) -> None:
    """Runs in the child process: writes each outcome to the file at `path`."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    with Path(path).open("w") as file:
        try:
            for outcome in importlib.import_module(source).examined(Request(**json.loads(request))):
                told = vars(outcome) | {"key": outcome.task.key}
                del told["task"]
                print(json.dumps(told), file=file, flush=True)
        except CommandError as error:
            print(json.dumps({"refused": str(error)}), file=file, flush=True)


def _end_with(parent: int) -> None:
    """Ends this process if the parent is killed, because it could go on for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
