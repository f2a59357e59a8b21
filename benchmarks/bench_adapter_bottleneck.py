# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_adapter_bottleneck: the CPU kernels against plain torch and torch.compile.

"eager" is the formula in plain torch, "compiled" the same through torch.compile; the residual is x, the activation
relu. Passes: forward; both, with gradients of x, weights and biases; weights, with x frozen. A row is timed only if
output and gradients agreed in this run. Times are minima over interleaved rounds; ratios mean more than milliseconds.
MB: the most memory that a call adds to the process.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import vitkern
from benchmarks.dense import Row, print_table
from vitkern import reference
from vitkern.cases import ADAPTER_CASES

CASES = ("adaptformer-video", "one-image", "adaptformer-vit-l", "adaptformer-4", "adaptformer-512")
TENSORS = ("x", "down_weight", "down_bias", "up_weight", "up_bias")
PASSES = {"forward": (), "both": (True,) * 5, "weights": (False, *(True,) * 4)}


def eager(*tensors: Tensor) -> Tensor:
    return reference.adapter_bottleneck(*tensors, residual=tensors[0], scale=0.1)


def ours(*tensors: Tensor) -> Tensor:
    return vitkern.adapter_bottleneck(*tensors, residual=tensors[0], scale=0.1)


def make(name: str, dtype: torch.dtype, what: str) -> Row:
    tensors = ADAPTER_CASES[name].make()
    inputs = tuple(tensors[key] for key in TENSORS)
    return Row({"vitkern": ours, "eager": eager}, inputs, dtype, PASSES[what])


def main() -> None:
    rows = (
        (f"{name:<19}{str(dtype)[6:]:<10}{what:<9}", partial(make, name, dtype, what))
        for name in CASES
        for dtype in (torch.float32, torch.bfloat16)
        for what in PASSES
    )
    heading = f"{'case':<19}{'dtype':<10}{'pass':<9}"
    print_table(__doc__.splitlines()[0], heading, ("eager", "compiled"), rows)


if __name__ == "__main__":
    main()
