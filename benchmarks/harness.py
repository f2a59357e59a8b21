# SPDX-License-Identifier: Apache-2.0
"""Timing on machines that others use too: variants in turn, many rounds, the minimum of each, ratios within one run."""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

import torch

from vitkern import _C
from vitkern.doctor import cpu_model


def arguments(description: str, *, seconds: float, compiles: bool = False) -> argparse.Namespace:
    """What every benchmark is told; threads are set. `seconds` is the time limit of a row if none is given.

    compiles: whether torch.compile is among those compared.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=seconds, help="time limit of a row")
    parser.add_argument("--match", default="", help="only rows whose text contains this")
    if compiles:
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def machine() -> str:
    """Where the figures come from, the first line of a table."""
    kernels = f"{torch.get_num_threads()} threads, {_C.cpu_isa()} kernels"
    return f"{cpu_model()}, {kernels}, torch {torch.__version__}"


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


def agree(
    function: Callable, formula: Callable, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> bool:
    """Whether output and gradients are those of the formula in float64, as far as the dtype can tell."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    results = []
    for run, kind in ((function, dtype), (formula, torch.float64)):
        leaves = [tensor.to(dtype).to(kind).requires_grad_() for tensor in inputs]
        output = run(*leaves)
        grad_output = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype).to(kind)
        results.append([output, *torch.autograd.grad(output, leaves, grad_output)])
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(*results))


def peak_megabytes(run: Callable[[], object]) -> float:
    """By how much a call raises the memory of this process at most, whoever allocates it. NaN where Linux has no say.

    What a call before left to the allocator is given back first, so that it does not hide what this call takes.
    """
    run()  # what is made once stays: threads, plans, scratch
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from what is resident now
    except (OSError, AttributeError):
        return float("nan")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status, in kilobytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))
