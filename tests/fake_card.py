# SPDX-License-Identifier: Apache-2.0
"""A card of arithmetic, instead of torch.cuda: a queue of work with a clock of its own beside the host's."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

from vitkern.bench.cuda_clock import CudaClock


class FakeCard:
    """Times are milliseconds. The host's time passes by `host`; the card's work begins when the host has issued it."""

    def __init__(self, megahertz: float = 2000.0) -> None:
        self.now, self.free, self.megahertz = 0.0, 0.0, megahertz
        self.spun: list[int] = []

    def host(self, ms: float) -> None:
        self.now += ms

    def work(self, ms: float) -> None:
        self.free = max(self.free, self.now) + ms

    def call(self, host_ms: float, device_ms: float, kernels: int = 1) -> None:
        """A call of some kernels, each issued after its part of the host's time."""
        for _ in range(kernels):
            self.host(host_ms / kernels)
            self.work(device_ms / kernels)

    def clock(self, **options) -> CudaClock:
        return CudaClock(torch.device("cpu"), cuda=self, seconds=lambda: self.now / 1e3, **options)

    # ---- The part of torch.cuda that a clock uses

    def Event(self, enable_timing: bool) -> Event:  # noqa: N802 - its name in torch.cuda
        assert enable_timing
        return Event(self)

    def _sleep(self, cycles: int) -> None:
        self.spun.append(cycles)
        self.work(cycles / self.megahertz / 1e3)

    def synchronize(self, device: torch.device) -> None:
        self.now = max(self.now, self.free)

    def device(self, device: torch.device) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1024)


class Event:
    def __init__(self, card: FakeCard) -> None:
        self.card = card

    def record(self) -> None:
        self.at = max(self.card.now, self.card.free)

    def query(self) -> bool:
        return self.at <= self.card.now

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at
