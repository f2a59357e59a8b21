# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_host_cost: what a call costs on the host, from Python to the launch, in calls of torch.mm.

The compiled kernels are replaced by ones that do nothing. "cpu" is the way to the native kernels; "cuda" that to the
CUDA kernels, which the same CPU tensors take as they do in the tests' emulator, so without asking for a stream.
The unit is one torch.mm of two 4x4 matrices, without gradients, in the same rounds. "floor" is what nobody can go below
who writes an op in Python: the same tensors through a torch.library op, or an autograd.Function that keeps them, which
allocate the output and do nothing else. Forward and backward together have no target.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

import vitkern
from vitkern.bench.measure import forward_backward
from vitkern.cases import MsDeformAttnCase, make_inputs
from vitkern.commands.doctor import cpu_model
from vitkern.ops import native
from vitkern.ops.op import forget_plans

CASE = MsDeformAttnCase("tiny", "", 1, ((4, 4), (2, 2)), 3, 2, 4, 2)
CALLS = 20  # of a sample
# Units allowed without and with gradients recorded, through the functions and through torch.ops.
TARGETS = {"function": (4, 6), "torch.ops": (10, 15)}

_floor = torch.library.Library("vitkern_floor", "DEF")
_floor.define(
    "op(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, int[]? points_per_level=None, "
    "str method='bilinear', str? backend=None) -> Tensor"
)


def without_kernels(compiled) -> SimpleNamespace:
    """The compiled module, in which whatever launches does nothing."""
    names = [name for name in dir(compiled) if not name.startswith("__")]
    stub = SimpleNamespace(**{name: getattr(compiled, name) for name in names})
    for device in ("cpu", "cuda"):
        setattr(stub, f"ms_deform_attn_forward_{device}", compiled.ms_deform_attn_forward_nothing)
        setattr(stub, f"ms_deform_attn_backward_{device}", lambda *arguments: None)
    return stub


def calls(backend: str) -> dict[tuple[str, str, str], Callable[[], object]]:
    """Forward and, with gradients, forward and backward: {(op, way, pass): call}."""
    inputs = make_inputs(CASE)
    value, *tables, locations, weights = inputs
    plain = (value, *tables, locations, weights)
    fused = (value, *tables, torch.rand(1, 3, 2, 2), locations, weights.flatten(3))
    made = {}
    for op, tensors in (("ms_deform_attn", plain), ("ms_deform_attn_fused", fused)):
        recorded = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors)
        for way, module in (("function", vitkern), ("torch.ops", torch.ops.vitkern)):
            run = getattr(module, op)
            made[op, way, "forward"] = lambda run=run, tensors=tensors: run(*tensors, backend=backend)
            made[op, way, "recorded"] = lambda run=run, recorded=recorded: run(*recorded, backend=backend)
            made[op, way, "both"] = forward_backward(
                lambda *tensors, run=run: run(*tensors, backend=backend), recorded
            )
    return made


def floors() -> dict[tuple[str, str, str], Callable[[], object]]:
    """What torch takes for the same tensors where nothing is checked, found or launched: {(op, way, pass): call}."""
    inputs = make_inputs(CASE)
    tensors, recorded = tuple(inputs), tuple(inputs.to(torch.float32).requires_grad_())
    shape = (1, CASE.queries, CASE.heads * CASE.channels)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tensors[0].new_empty(*shape)

    _floor.impl("op", lambda value, *_: value.new_empty(*shape), "CompositeExplicitAutograd")
    _floor.impl("op", lambda *tensors: Function.apply(*tensors[:5]), "Autograd")
    apply = super(torch.autograd.Function, Function).apply
    return {
        ("floor", "function", "forward"): lambda: tensors[0].new_empty(*shape),
        ("floor", "function", "recorded"): lambda: apply(*recorded),
        ("floor", "torch.ops", "recorded"): lambda: torch.ops.vitkern_floor.op(*recorded, backend="cpu"),
    }


def shortest(runs: dict[object, Callable[[], object]], seconds: float) -> dict[object, float]:
    """Microseconds of each call: the least of many short samples, taken in turn, so that a neighbour misses some."""
    best = dict.fromkeys(runs, float("inf"))
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for name, run in runs.items():
            run()
            started = time.perf_counter()
            for _ in range(CALLS):
                run()
            best[name] = min(best[name], (time.perf_counter() - started) / CALLS * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit for each backend")
    arguments = parser.parse_args()
    matrix, empty = torch.ones(4, 4), floors()
    recorded = matrix.clone().requires_grad_()
    native._C = native.cuda_module = without_kernels(native._C)
    print(f"{cpu_model()}, torch {torch.__version__}")
    for backend in ("cpu", "cuda"):
        if backend == "cuda":
            native.cuda_module = without_kernels(
                native._C
            )  # another module than _C: the emulator, as it seems
        forget_plans()
        runs = {
            "unit": lambda: torch.mm(matrix, matrix),
            "unit, recorded": lambda: torch.mm(recorded, matrix),
        }
        runs |= empty | calls(backend)
        best = shortest(runs, arguments.seconds)
        unit = best["unit"]
        print(f"{backend}: torch.mm {unit:.2f} us, with gradients recorded {best['unit, recorded']:.2f} us")
        for name in list(runs)[2:]:
            op, way, what = name
            target = "" if "both" in name or "floor" in name else f" of {TARGETS[way][what == 'recorded']}"
            print(
                f"  {op:<22}{way:<11}{what:<10}{best[name]:>8.1f} us {best[name] / unit:>7.1f} units{target}"
            )


if __name__ == "__main__":
    main()
