# SPDX-License-Identifier: Apache-2.0
"""Timing on a card: the time of the card and of the host apart, and the clock that the card ran at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], object]
LEAST_CYCLES = 2**20  # half a millisecond, beside which the microseconds of two events are nothing
MOST_CYCLES = 2**27
CYCLES_OF_A_MILLISECOND = 3e6  # no card has a higher clock


@dataclass(frozen=True)
class Sample:
    """Medians of some calls."""

    device_ms: float
    host_ms: float  # until the call returns
    megahertz: float  # of the multiprocessors, just before
    ahead: bool  # the host was done before the card began; otherwise device_ms holds time of the host


class CudaClock:
    """Events before and after each call; a sample is the median of some calls.

    Twice the L2 cache is written before each call, so that no call finds its inputs there, as none would in a network;
    `flush=False` leaves that out. Before it the card spins for a number of cycles. The host issues the call meanwhile,
    so the events enclose the kernels and not their launches. If the host was late for all calls of a sample, they are
    made again after more cycles. A call that it was late for counts only if it was for all. The cycles over the time
    that they took are the card's clock.

    `cuda` stands for torch.cuda, `seconds` for the host's clock.
    """

    CALLS = 5

    def __init__(
        self,
        device: torch.device,
        *,
        flush: bool = True,
        cuda: Any = torch.cuda,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.cuda, self.seconds = device, cuda, seconds
        self.scratch: torch.Tensor | None = None
        if flush:
            cache = cuda.get_device_properties(device).L2_cache_size or 2**25
            self.scratch = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self.last: Sample | None = None
        self._cycles: dict[Run, int] = {}  # of calls that need more
        self._late: set[Run] = set()  # calls that more cycles do not help: they wait for the card

    def calls(self, run: Run) -> int:
        run()
        run()
        self.cuda.synchronize(self.device)
        return self.CALLS

    def milliseconds(self, run: Run, calls: int) -> float:
        with self.cuda.device(self.device):
            found = self._timed(run, calls)
            if not any(one.ahead for one in found) and run not in self._late:
                longer = 4 * CYCLES_OF_A_MILLISECOND * max(one.host_ms for one in found)
                self._cycles[run] = min(max(int(longer), 2 * LEAST_CYCLES), MOST_CYCLES)
                found = self._timed(run, calls)
                if not any(one.ahead for one in found):
                    del self._cycles[run]
                    self._late.add(run)
        self.last = _median(found)
        return self.last.device_ms

    def _timed(self, run: Run, calls: int) -> list[Sample]:
        cycles, issued = self._cycles.get(run, LEAST_CYCLES), []
        for _ in range(calls):
            spins, spun, start, end = (self.cuda.Event(enable_timing=True) for _ in range(4))
            spins.record()
            self.cuda._sleep(cycles)
            spun.record()
            if self.scratch is not None:
                self.scratch.zero_()
            start.record()
            began = self.seconds()
            run()
            host_ms = (self.seconds() - began) * 1e3
            end.record()
            issued.append((spins, spun, start, end, host_ms, not start.query()))
        self.cuda.synchronize(self.device)
        return [
            Sample(start.elapsed_time(end), host_ms, cycles / spins.elapsed_time(spun) / 1e3, ahead)
            for spins, spun, start, end, host_ms, ahead in issued
        ]


def _median(calls: Sequence[Sample]) -> Sample:
    counted = [one for one in calls if one.ahead] or calls
    return Sample(
        statistics.median(one.device_ms for one in counted),
        statistics.median(one.host_ms for one in calls),
        statistics.median(one.megahertz for one in calls),
        counted[0].ahead,
    )
