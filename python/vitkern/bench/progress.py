# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a bar with the time left on a terminal where rich is installed, else lines."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Steps of about equal length, with lines of a table printed above the bar."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.started = time.monotonic()
        self.bar = _bar() if sys.stdout.isatty() and sys.stderr.isatty() else None
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

    def begins(self, what: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def line(self, text: str) -> None:
        """On standard output in any case, so that a table can be piped."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.advance(self.task)

    def left(self) -> str:
        """Of the time so far, in words."""
        if not self.done:
            return ""
        seconds = (time.monotonic() - self.started) / self.done * (self.steps - self.done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


def _bar() -> Any:
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Bar(*columns, transient=True)
