# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_adapter_bottleneck: the CPU kernels against plain torch and torch.compile.

"eager" is the formula in plain torch, "compiled" the same through torch.compile; the residual is x, the activation
relu. Passes: forward; both, with gradients of x, weights and biases; weights, where x is frozen. A row is timed only if
output and gradients agreed in this run. Times are minima over interleaved rounds; look at ratios, not at milliseconds.
MB: by how much a call raises the process's memory at most.
"""

from __future__ import annotations

import argparse
import functools
import shutil

import torch
from torch import Tensor

import vitkern
from benchmarks.cases import ADAPTER_CASES
from benchmarks.harness import agree, forward_backward, interleaved, peak_megabytes
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


def measure(name: str, dtype: torch.dtype, what: str, compiles: bool, seconds: float):
    tensors = ADAPTER_CASES[name].make()
    exact = tuple(tensors[key] for key in ("x", "down_weight", "down_bias", "up_weight", "up_bias"))
    if not agree(ours, eager, exact, dtype):
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
        variants = {name: wrap(function) for name, function in functions.items()}
        samples = interleaved(variants, seconds=seconds)
        best = {name: min(times) for name, times in samples.items()}
        return best, {name: peak_megabytes(variants[name]) for name in ("vitkern", "eager")}


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
    memory = f"{'vitkern MB':>12}{'eager MB':>10}"
    print(f"{'case':<19}{'dtype':<10}{'pass':<9}{'vitkern ms':>10}{headings}{memory}")
    for name, dtype, what in ROWS:
        label = f"{name:<19}{str(dtype)[6:]:<10}{what:<9}"
        if arguments.match not in label:
            continue
        measured = measure(name, dtype, what, compiles, arguments.seconds)
        if measured is None:
            print(f"{label}  results differ: not timed")
            continue
        best, peak = measured
        cells = (
            f"{best[column]:>13.2f}{best[column] / best['vitkern']:>6.2f}x"
            if column in best
            else f"{'-':>20}"
            for column in ("eager", "compiled")
        )
        print(
            f"{label}{best['vitkern']:>10.2f}{''.join(cells)}{peak['vitkern']:>12.1f}{peak['eager']:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
