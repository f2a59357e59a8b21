# SPDX-License-Identifier: Apache-2.0
"""Timing on machines that others use too: variants in turn, many rounds, the minimum of each, ratios within one run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from vitkern import _C
from vitkern.doctor import cpu_model


def arguments(description: str, *, seconds: float) -> argparse.Namespace:
    """What every benchmark is told; threads are set. `seconds` is the time limit of a row if none is given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=seconds, help="time limit of a row")
    parser.add_argument("--match", default="", help="only rows whose text contains this")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def machine() -> str:
    """Where the figures come from, the first line of a table."""
    kernels = f"{torch.get_num_threads()} threads, {_C.cpu_isa()} kernels"
    return f"{cpu_model()}, {kernels}, torch {torch.__version__}, batch 1"


def interleaved(variants: dict[str, Callable[[], object]], *, rounds: int = 25, seconds: float = 20.0):
    """Milliseconds of each call of each variant: {name: [ms, ...]}, all variants once a round, until a limit is met.

    A sample is as many calls as take 20 ms: no variant then pays for the caches that the one before has filled, or for
    waking the thread pool, any more than it would in a loop of its own.
    """
    calls = {}
    for name, run in variants.items():
        run()
        started = time.perf_counter()
        run()
        calls[name] = max(1, round(20e-3 / max(time.perf_counter() - started, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - started) * 1e3 / calls[name])
        if time.perf_counter() > deadline and done >= 2:
            break
    return samples


def forward_backward(function: Callable, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """A call that runs `function(*inputs)` and the backward pass to those that require a gradient.

    The gradient of the output is made once: to fill it takes as long as a pass over the output.
    """
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    grad_output = torch.ones_like(function(*inputs))

    def run():
        return torch.autograd.grad(function(*inputs), wanted, grad_output)

    return run
