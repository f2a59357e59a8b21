# SPDX-License-Identifier: Apache-2.0
"""The card's half of `vitkern demo`: every backend that runs there against grid_sample, as it is and compiled.

Attention alone, on the inputs of the CPU's rows, in float32 and bfloat16; locations and weights are float32 in both, as
in networks under autocast. A contender has a time only if it agreed with grid_sample in this run. Events enclose the
calls while the host runs ahead, and the median is the figure. The device and its clock are arguments.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.bench.measure import Clock, clock_of, interleaved, peak_megabytes
from vitkern.commands import demo
from vitkern.commands.errors import in_one_line
from vitkern.ops import backends
from vitkern.reference import ms_deform_attn_by_grid_sample

Function = Callable[..., Tensor]
BACKENDS = ("cuda", "triton")
EAGER, COMPILED = "grid_sample", "grid_sample compiled"

# Both sides round results to the eight bits of bfloat16 once, which makes 2e-3 of a 2-norm; float32 is as on the CPU.
TOLERANCE = {
    torch.float32: demo.TOLERANCE,
    torch.bfloat16: {"forward": 1e-2, "forward + backward": 2e-2},
}


def card() -> tuple[torch.device, Clock] | None:
    """The current card and its clock; None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device, clock_of(device)


def table(
    images: Sequence[tuple[int, int]],
    device: torch.device,
    clock: Clock,
    *,
    names: Sequence[str] = BACKENDS,
    compiler: Callable[[Function], Function] = torch.compile,
    seconds: float | None = None,
) -> bool:
    """Prints a row for each image, dtype, pass and contender; returns whether every kernel was right."""
    ours = _that_run(names, device)
    print(
        f"{'image':<11}{'dtype':<6}{'pass':<19}{'':<22}{'ms':>9}{'ratio':>9}{'peak MB':>9}   equal to within"
    )
    passed = True
    for image in images:
        value, locations, weights = (tensor.to(device) for tensor in demo.comparisons(image)[0].inputs)
        contenders = _contenders(image, ours, device, compiler)
        for dtype, tolerance in TOLERANCE.items():
            inputs = [value.to(dtype), locations, weights]
            for what, most in tolerance.items():
                label = f"{f'{image[0]}x{image[1]}':<11}{_short(dtype):<6}{what:<19}"
                calls = _calls(contenders, inputs, what != "forward")
                lines, right = _rows(calls, ours, most, device, clock, seconds)
                print("\n".join(label + line for line in lines), flush=True)
                passed &= right
    return passed


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _that_run(names: Sequence[str], device: torch.device) -> list[str]:
    reasons = {name: backends.can_run(name, device, torch.float32) for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name}: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def _contenders(
    image: tuple[int, int],
    ours: Sequence[str],
    device: torch.device,
    compiler: Callable[[Function], Function],
) -> dict[str, Function]:
    shapes, starts = demo.pyramid(image)
    sizes = [(height, width) for height, width in shapes.tolist()]
    tables = shapes.to(device), starts.to(device)

    def by_grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_by_grid_sample(value.float(), sizes, locations, weights).to(value.dtype)

    def by(backend: str) -> Function:
        return lambda value, *rest: vitkern.ms_deform_attn(value, *tables, *rest, backend=backend)

    return {EAGER: by_grid_sample, COMPILED: compiler(by_grid_sample), **{name: by(name) for name in ours}}


def _calls(
    contenders: dict[str, Function], inputs: Sequence[Tensor], backward: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """A call without arguments for each contender: the output, and with `backward` all gradients."""
    inputs = [tensor.detach().requires_grad_(backward) for tensor in inputs]
    with torch.no_grad():
        towards = torch.randn_like(contenders[EAGER](*inputs))

    def call(function: Function) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            output = function(*inputs)
        return [output, *torch.autograd.grad(output, inputs, towards)] if backward else [output]

    return {name: functools.partial(call, function) for name, function in contenders.items()}


def _rows(
    calls: dict[str, Callable[[], list[Tensor]]],
    ours: Sequence[str],
    most: float,
    device: torch.device,
    clock: Clock,
    seconds: float | None,
) -> tuple[list[str], bool]:
    """A line for each contender, and whether all kernels were right. The yardstick is grid_sample, not compiled."""
    expected = calls[EAGER]()
    apart: dict[str, float] = {}
    said: dict[str, str] = {}  # the reasons of contenders without a time
    for name, call in calls.items():
        try:
            apart[name] = demo.difference(
                [each.float() for each in call()], [each.float() for each in expected]
            )
        except Exception as error:  # of a compiler, a launch or the card's memory: the other contenders go on
            said[name] = f"raised {type(error).__name__}: {in_one_line(error)}"
            continue
        if not apart[name] <= most:
            said[name] = f"the two differ by {apart[name]:.1e}"
    right: dict[str, Any] = {name: call for name, call in calls.items() if name not in said}
    limit = demo.SECONDS_OF_TIMING if seconds is None else seconds
    taken = {
        name: statistics.median(samples)
        for name, samples in interleaved(right, seconds=limit, clock=clock).items()
    }
    lines = []
    for name in calls:
        if name in said:
            lines.append(f"{name:<22}   {'FAILED' if name in ours else 'not timed'}: {said[name]}")
            continue
        peak = peak_megabytes(calls[name], device)
        ratio = f"{taken[EAGER] / taken[name]:.1f}x"
        lines.append(f"{name:<22}{taken[name]:>9.3f}{ratio:>9}{peak:>9.0f}   {apart[name]:.0e}")
    return lines, not any(name in said for name in ours)
