# SPDX-License-Identifier: Apache-2.0
"""Runs cases in worker processes for a given time: a crash ends a worker only, and its case is reported."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from tools.fuzzing.draw import BACKENDS, DTYPES, OPS, begin

_CONTEXT = multiprocessing.get_context("spawn")
_HANGS = 180.0  # seconds that one case may take
_STOP, _DONE, _NUMBER, _UNSURE, _NUMBERS, _COUNTS = range(
    6
)  # places in what a worker shares; counts come last
_PLACES = _COUNTS + 2 * len(OPS) * len(BACKENDS) * len(DTYPES)

Kind = tuple[str, str, str]  # op, backend, dtype


def kinds() -> Iterator[Kind]:
    return itertools.product(OPS, BACKENDS, DTYPES)


@dataclass(frozen=True)
class Wanted:
    """The cases to run; without an op, those of all ops."""

    op: str | None
    backends: tuple[str, ...]

    def takes(self, number: int) -> bool:
        case, _ = begin(number)
        return self.op in (None, case.op) and case.backend in self.backends


@dataclass(frozen=True)
class Numbers:
    """Every `step`-th number from `first` on, up to `end` if given."""

    first: int
    step: int = 1
    end: int | None = None

    def __iter__(self) -> Iterator[int]:
        every = itertools.count(self.first, self.step)
        return itertools.takewhile(lambda number: self.end is None or number < self.end, every)


def work(numbers: Numbers, wanted: Wanted, shared: Any, say: Callable[[str], None]) -> None:
    """Runs cases and counts them in `shared`, until there are no more or `shared` says to stop."""
    from tools.fuzzing.one import try_case

    place = {kind: _COUNTS + 2 * at for at, kind in enumerate(kinds())}
    for number in numbers:
        if shared[_STOP]:
            break
        if not wanted.takes(number):
            continue
        shared[_NUMBER] = number
        outcome = try_case(number)
        case = outcome.case
        at = place[case.op, case.backend, case.dtype]
        shared[at] += 1
        shared[_UNSURE] += outcome.numbers[0]
        shared[_NUMBERS] += outcome.numbers[1]
        if outcome.found:
            shared[at + 1] += 1
            say(outcome.report())
    shared[_DONE] = 1


def _end_with_the_parent() -> None:
    """Ends this process when the command ends, for any reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_apart(numbers: Numbers, wanted: Wanted, shared: Any, pipe: Connection) -> None:
    faulthandler.enable()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    work(numbers, wanted, shared, pipe.send)


class Worker:
    """A process and its shared counters; if it ends too early, another one continues with the next number."""

    def __init__(self, numbers: Numbers, wanted: Wanted) -> None:
        self.numbers, self.wanted = numbers, wanted
        self.shared = _CONTEXT.RawArray("q", _PLACES)
        self.shared[_NUMBER] = numbers.first - numbers.step
        self.lost: list[int] = []  # numbers of cases that ended the process
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe(duplex=False)
        left = replace(self.numbers, first=self.shared[_NUMBER] + self.numbers.step)
        self.process: SpawnProcess = _CONTEXT.Process(
            target=_work_apart, args=(left, self.wanted, self.shared, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.seen = self.shared[_NUMBER], time.monotonic()

    @property
    def done(self) -> bool:
        return bool(self.shared[_DONE])

    def messages(self) -> Iterator[str]:
        try:
            while self.pipe.poll():
                yield self.pipe.recv()
        except EOFError:
            pass

    def look(self) -> str | None:
        """The fault of a process that crashed or hangs, which is then replaced; None if it runs."""
        now, number = time.monotonic(), self.shared[_NUMBER]
        if number != self.seen[0]:
            self.seen = number, now
        ended, hangs = not self.process.is_alive(), now - self.seen[1] > _HANGS
        if self.done or not (ended or hangs):
            return None
        if hangs:
            self.process.kill()
        self.process.join()
        status = self.process.exitcode
        if number < self.numbers.first or number in self.lost:
            raise RuntimeError(f"a worker ended with status {status} before its first case")
        self.lost.append(number)
        self._start()
        what = "took too long" if hangs else f"ended its process with status {status}"
        return f"case {number}: {what}"

    def stop(self) -> None:
        self.shared[_STOP] = 1

    def end(self) -> None:
        self.process.join(_HANGS)
        if self.process.is_alive():
            self.process.kill()


@dataclass
class Tally:
    counts: dict[Kind, int]
    wrong: dict[Kind, int]
    seconds: float
    unsure: float  # the share of numbers that may be anything


def fuzz(minutes: float, numbers: Numbers, workers: int, wanted: Wanted, say: Callable[[str], None]) -> Tally:
    """Runs cases in `workers` processes for `minutes`, or to the end of the numbers."""
    started = time.monotonic()
    if workers == 0:  # in this process, whose end a crash would be
        shared = [0] * _PLACES
        work(numbers, wanted, shared, say)
        return _tally([shared], [], time.monotonic() - started)
    shares = [replace(numbers, first=numbers.first + at, step=workers) for at in range(workers)]
    crew = [Worker(share, wanted) for share in shares]
    while time.monotonic() - started < 60 * minutes and not all(worker.done for worker in crew):
        time.sleep(0.2)
        for worker in crew:
            for message in worker.messages():
                say(message)
            if (happened := worker.look()) is not None:
                say(happened)
    for worker in crew:
        worker.stop()
    for worker in crew:
        worker.end()
        for message in worker.messages():
            say(message)
    lost = [number for worker in crew for number in worker.lost]
    return _tally([worker.shared for worker in crew], lost, time.monotonic() - started)


def _tally(shared: Sequence[Sequence[int]], lost: list[int], seconds: float) -> Tally:
    every = [sum(each[at] for each in shared) for at in range(_PLACES)]
    counts = {kind: every[_COUNTS + 2 * at] for at, kind in enumerate(kinds())}
    wrong = {kind: every[_COUNTS + 2 * at + 1] for at, kind in enumerate(kinds())}
    for number in lost:
        case, _ = begin(number)
        counts[case.op, case.backend, case.dtype] += 1
        wrong[case.op, case.backend, case.dtype] += 1
    return Tally(counts, wrong, seconds, every[_UNSURE] / max(every[_NUMBERS], 1))
