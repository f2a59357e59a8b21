# SPDX-License-Identifier: Apache-2.0
"""Timing on shared machines: variants in turn, many rounds, the minimum of each, ratios within one run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from vitkern.bench.cuda_clock import CudaClock, Run, Sample

SAMPLE_SECONDS = 20e-3


class Clock(Protocol):
    """The time of a call on a device. A sample is a number of calls, the same in every round.

    A clock of a card has more of the last sample in `last`.
    """

    def calls(self, run: Run) -> int: ...

    def milliseconds(self, run: Run, calls: int) -> float: ...


class HostClock:
    """A sample is the number of calls that take 20 ms. A variant then pays no more for the caches that the one before
    has filled, or for waking the thread pool, than it would in a loop of its own.
    """

    def __init__(self, seconds: float = SAMPLE_SECONDS) -> None:
        self.seconds = seconds

    def calls(self, run: Run) -> int:
        run()
        alone = min(self.milliseconds(run, 1) for _ in range(2))
        return max(1, round(self.seconds * 1e3 / max(alone, 1e-4)))

    def milliseconds(self, run: Run, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) * 1e3 / calls


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock(SAMPLE_SECONDS)


def interleaved(
    variants: Mapping[str, Run],
    *,
    rounds: int = 25,
    seconds: float = 20.0,
    least: int = 3,
    clock: Clock | None = None,
    calls: dict[str, int] | None = None,
    more: dict[str, list[Sample]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each call of each variant: {name: [ms, ...]}, all variants once a round, until a limit is met.

    `least`: the rounds to run in any case. `calls`: the calls of a sample; missing ones are found and added.
    `more`: receives what a clock of a card knows besides of each sample.
    """
    clock, calls = clock or HostClock(), {} if calls is None else calls
    for name, run in variants.items():
        if name not in calls:
            calls[name] = clock.calls(run)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds
    for done in range(1, rounds + 1):
        for name, run in variants.items():
            samples[name].append(clock.milliseconds(run, calls[name]))
            if more is not None and isinstance(last := getattr(clock, "last", None), Sample):
                more.setdefault(name, []).append(last)
        if time.perf_counter() > deadline and done >= least:
            break
    return samples


def forward_backward(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Run:
    """A call that runs `function(*inputs)` and the backward pass to those that require a gradient.

    The gradient of the output is made once: to fill it takes as long as a pass over the output.
    """
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    grad_output = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), wanted, grad_output)


def backward_alone(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Run:
    """A call that runs the backward pass of one forward pass."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    output = function(*inputs)
    grad_output = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)


def peak_megabytes(run: Run, device: torch.device | None = None) -> float:
    """The most memory that a call adds; NaN where the system does not report it.

    On the host it is the memory of this process, from any allocator. Memory that earlier calls left to the allocator is
    given back first, so that it does not hide what this call takes. On a GPU it is what torch's allocator hands out.
    """
    run()  # threads, plans and scratch are made once and stay
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from the resident memory
    except (OSError, AttributeError):
        return float("nan")
    resident = _status("VmRSS")
    run()
    return (_status("VmHWM") - resident) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status, in kilobytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))
