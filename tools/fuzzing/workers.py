# SPDX-License-Identifier: Apache-2.0
"""Cases in processes of their own, for as long as there is time: a crash ends a worker, and its case is told."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from tools.fuzzing.draw import BACKENDS, DTYPES, OPS, begin

_CONTEXT = multiprocessing.get_context("spawn")
_HANGS = 180.0  # seconds that one case may take
_STOP, _NUMBER, _UNSURE, _NUMBERS, _COUNTS = range(5)  # places in what a worker shares; counts come last
_PLACES = _COUNTS + 2 * len(OPS) * len(BACKENDS) * len(DTYPES)

Kind = tuple[str, str, str]  # op, backend, dtype


def kinds() -> Iterator[Kind]:
    return itertools.product(OPS, BACKENDS, DTYPES)


@dataclass(frozen=True)
class Wanted:
    """Which of the numbers are run; None: of all."""

    op: str | None = None
    backend: str | None = None

    def takes(self, number: int) -> bool:
        if self.op is None and self.backend is None:
            return True
        case, _ = begin(number)
        return self.op in (None, case.op) and self.backend in (None, case.backend)


def work(numbers: tuple[int, int], wanted: Wanted, shared: Any, pipe: Connection) -> None:
    """In a worker: the first number and the step to the next."""
    faulthandler.enable()
    from tools.fuzzing.one import try_case

    place = {kind: _COUNTS + 2 * at for at, kind in enumerate(kinds())}
    for number in itertools.count(*numbers):
        if shared[_STOP]:
            return
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
            pipe.send(outcome.report())


class Worker:
    """A process and what it shares; one that ends is followed by another, from the next number on."""

    def __init__(self, first: int, step: int, wanted: Wanted) -> None:
        self.step, self.wanted = step, wanted
        self.shared = _CONTEXT.RawArray("q", _PLACES)
        self.shared[_NUMBER] = first - step
        self.lost: list[int] = []  # numbers of cases that ended the process
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe(duplex=False)
        numbers = self.shared[_NUMBER] + self.step, self.step
        self.process: SpawnProcess = _CONTEXT.Process(
            target=work, args=(numbers, self.wanted, self.shared, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.seen = self.shared[_NUMBER], time.monotonic()

    def messages(self) -> Iterator[str]:
        try:
            while self.pipe.poll():
                yield self.pipe.recv()
        except EOFError:
            pass

    def look(self) -> str | None:
        """What happened to the process, after which the next one has begun; None if it is well."""
        now, number = time.monotonic(), self.shared[_NUMBER]
        if number != self.seen[0]:
            self.seen = number, now
        ended, hangs = not self.process.is_alive(), now - self.seen[1] > _HANGS
        if not (ended or hangs):
            return None
        if hangs:
            self.process.kill()
        self.process.join()
        status = self.process.exitcode
        if ended and number == self.seen[0] and self.lost and self.lost[-1] == number:
            raise RuntimeError(f"a worker cannot start: it ended with {status}")
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


def fuzz(
    minutes: float, first: int, count: int, wanted: Wanted, say: Callable[[str], None]
) -> Tally:
    """Runs cases from `first` on in so many workers for so many minutes."""
    started = time.monotonic()
    workers = [Worker(first + at, count, wanted) for at in range(count)]
    while time.monotonic() - started < 60 * minutes:
        time.sleep(0.2)
        for worker in workers:
            for message in worker.messages():
                say(message)
            if (happened := worker.look()) is not None:
                say(happened)
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.end()
        for message in worker.messages():
            say(message)
    return _added_up(workers, time.monotonic() - started)


def _added_up(workers: list[Worker], seconds: float) -> Tally:
    every = [sum(worker.shared[at] for worker in workers) for at in range(_PLACES)]
    counts = {kind: every[_COUNTS + 2 * at] for at, kind in enumerate(kinds())}
    wrong = {kind: every[_COUNTS + 2 * at + 1] for at, kind in enumerate(kinds())}
    for worker in workers:
        for number in worker.lost:
            case, _ = begin(number)
            counts[case.op, case.backend, case.dtype] += 1
            wrong[case.op, case.backend, case.dtype] += 1
    return Tally(counts, wrong, seconds, every[_UNSURE] / max(every[_NUMBERS], 1))
