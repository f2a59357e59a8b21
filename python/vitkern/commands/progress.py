# SPDX-License-Identifier: Apache-2.0
"""The progress of a run: on a terminal with rich a bar with the time left, else lines."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Steps of about equal length. The output goes to standard error: standard output is for results."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.started = time.monotonic()
        self.bar = _bar() if sys.stderr.isatty() else None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, what: str) -> None:
        """Starts the step `what`; the one before is done."""
        if self.bar is not None:
            self.bar.update(self.task, description=what, completed=self.done)
        else:
            print(f"{self.done + 1:>5}/{self.steps}  {what}{self._left()}", file=sys.stderr, flush=True)
        self.done += 1

    def _left(self) -> str:
        if not self.done:
            return ""
        seconds = round((time.monotonic() - self.started) / self.done * (self.steps - self.done))
        return f", {seconds // 60}:{seconds % 60:02d} left"


def _bar() -> Any:
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Bar(*columns, console=Console(stderr=True), transient=True)
