# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_adapter_bottleneck: the CPU kernels against plain torch and torch.compile.

"eager" is the formula in plain torch, "compiled" the same through torch.compile; the residual is x, the activation
relu. Passes: forward; both, with gradients of x, weights and biases; weights, where x is frozen. A row is timed only if
output and gradients agreed in this run. Times are minima over interleaved rounds; look at ratios, not at milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import shutil

import torch
from torch import Tensor

import vitkern
from benchmarks.cases import ADAPTER_CASES
from benchmarks.harness import forward_backward, interleaved
from vitkern import _C, reference
from vitkern.doctor import cpu_model

# (case, dtype, pass): one row each.
ROWS = [
    (name, dtype, what)
    for name in ("adaptformer-video", "one-image", "adaptformer-vit-l", "adaptformer-4", "adaptformer-512")
    for dtype in (torch.float32, torch.bfloat16)
    for what in ("forward", "both", "weights")
]


def eager(*tensors: Tensor) -> Tensor:
    return reference.adapter_bottleneck(*tensors, residual=tensors[0], scale=0.1)


def ours(*tensors: Tensor) -> Tensor:
    return vitkern.adapter_bottleneck(*tensors, residual=tensors[0], scale=0.1)


def agree(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether output and gradients are those of the formula in float64, as far as the dtype can tell."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    results = []
    for function, kind in ((ours, dtype), (eager, torch.float64)):
        leaves = [tensor.to(dtype).to(kind).requires_grad_() for tensor in inputs]
        output = function(*leaves)
        grad_output = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype).to(kind)
        results.append([output, *torch.autograd.grad(output, leaves, grad_output)])
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(*results))


def measure(name: str, dtype: torch.dtype, what: str, compiles: bool, seconds: float):
    tensors = ADAPTER_CASES[name].make()
    exact = tuple(tensors[key] for key in ("x", "down_weight", "down_bias", "up_weight", "up_bias"))
    if not agree(exact, dtype):
        return None
    inputs = tuple(tensor.to(dtype).requires_grad_(what != "forward") for tensor in exact)
    inputs[0].requires_grad_(what == "both")
    functions = {"vitkern": ours, "eager": eager}
    if compiles:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(eager, dynamic=False)

    def wrap(function):
        if what == "forward":
            return functools.partial(function, *inputs)
        return forward_backward(function, inputs)

    with torch.set_grad_enabled(what != "forward"):
        samples = interleaved({name: wrap(function) for name, function in functions.items()}, seconds=seconds)
    return {name: min(times) for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="time limit of a row")
    parser.add_argument("--match", default="", help="only rows whose text contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiles = not arguments.no_compile and shutil.which("g++") is not None
    print(f"{cpu_model()}, {arguments.threads} threads, {_C.cpu_isa()} kernels, torch {torch.__version__}")
    headings = "".join(f"{column + ' ms':>13}{'ratio':>7}" for column in ("eager", "compiled"))
    print(f"{'case':<19}{'dtype':<10}{'pass':<9}{'vitkern ms':>10}{headings}")
    for name, dtype, what in ROWS:
        label = f"{name:<19}{str(dtype)[6:]:<10}{what:<9}"
        if arguments.match not in label:
            continue
        best = measure(name, dtype, what, compiles, arguments.seconds)
        if best is None:
            print(f"{label}  results differ: not timed")
            continue
        cells = (
            f"{best[column]:>13.2f}{best[column] / best['vitkern']:>6.2f}x"
            if column in best
            else f"{'-':>20}"
            for column in ("eager", "compiled")
        )
        print(f"{label}{best['vitkern']:>10.2f}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
