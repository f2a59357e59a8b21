# SPDX-License-Identifier: Apache-2.0
"""The limits of the machine, measured in the same run: the rates of copies and of matrix products.

A row's limit is the longer of two times: that of moving its inputs and results once each, at the rate of a copy, and
that of the op's multiplications and additions at the rate of a matrix product. On a CPU the rate of a copy depends on
the cache that holds it, so it is measured at several sizes, and a row's limit uses the rate at the row's own size.
Kernels that gather touch each pixel many times and stay far from the limit; their share depends on the op, not on the
quality of the code.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitkern.bench.measure import Run, clock_of, interleaved
from vitkern.cases import Case
from vitkern.cases.record import Op
from vitkern.commands.choices import dtype_name
from vitkern.ops import flops as flops  # registers the counts of operations

Ceilings = dict[str, Any]
COPIED = {"cpu": [2**20 * 4**n for n in range(5)], "cuda": [2**30]}  # bytes read and written, together
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of a product that is large enough for the full rate


class Machine:
    """The best rates of a device in a run so far, measured repeatedly: other processes may slow a measurement."""

    def __init__(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
        self.clock = clock_of(device)
        names = {dtype_name(dtype): dtype for dtype in (torch.float32, *dtypes)}
        self.copies = {str(size): _copy(size, device) for size in COPIED[device.type]}
        self.sizes = {name: _product_size(dtype, device) for name, dtype in names.items()}
        self.products = {name: _product(self.sizes[name], dtype, device) for name, dtype in names.items()}
        # {"copy": {bytes: GB/s}, "product": {dtype: GFLOP/s}}
        self.ceilings: Ceilings = {
            "copy": dict.fromkeys(self.copies, 0.0),
            "product": dict.fromkeys(names, 0.0),
        }

    def measure(self, rounds: int = 1) -> None:
        copied = interleaved(self.copies, rounds=rounds, clock=self.clock)
        multiplied = interleaved(self.products, rounds=rounds, clock=self.clock)
        rates = {
            "copy": {size: int(size) / min(times) / 1e6 for size, times in copied.items()},
            "product": {
                name: 2 * self.sizes[name] ** 3 / min(times) / 1e6 for name, times in multiplied.items()
            },
        }
        for what, found in rates.items():
            for name, rate in found.items():
                self.ceilings[what][name] = max(self.ceilings[what][name], rate)


def _copy(size: int, device: torch.device) -> Run:
    # Random numbers: untouched zeros all lie in one page of memory, and cards do less work for zeros.
    source = torch.randn(size // 8, device=device).view(torch.uint8)
    target = torch.zeros_like(source)
    return functools.partial(target.copy_, source)


def _product_size(dtype: torch.dtype, device: torch.device) -> int:
    """Rows and columns: fewer for a dtype that lacks instructions here and so takes a hundred times as long."""
    size = PRODUCT[device.type] // 4
    run = _product(size, dtype, device)
    clock = clock_of(device)
    return PRODUCT[device.type] if clock.milliseconds(run, clock.calls(run)) < 2 else size


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Run:
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return functools.partial(torch.mm, left, right, out=torch.empty_like(left))


def copy_rate(ceiling: Ceilings, size: int) -> float:
    """GB/s of a copy of this many bytes: between two measured sizes, the straight line over their logarithms."""
    known = sorted((int(size), rate) for size, rate in ceiling["copy"].items())
    if size <= known[0][0]:
        return float(known[0][1])
    for (small, first), (large, last) in itertools.pairwise(known):
        if size <= large:
            share = math.log(size / small) / math.log(large / small)
            return float(first + share * (last - first))
    return float(known[-1][1])


def product_rate(ceiling: Ceilings, dtype: str) -> float:
    """GFLOP/s. For 16-bit inputs, which may be multiplied as float32, it is the higher of the two rates."""
    rates: Mapping[str, float] = ceiling["product"]
    return rates[dtype] if dtype == "float64" else max(rates[dtype], rates["float32"])


def limit(ceiling: Ceilings, dtype: str, moved: int, operations: int) -> tuple[float, str]:
    """The least milliseconds that the machine needs, and for what: "memory" or "arithmetic"."""
    memory = moved / copy_rate(ceiling, moved) / 1e6
    arithmetic = operations / product_rate(ceiling, dtype) / 1e6
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def cost(op: Op, case: Case, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Bytes and operations of each pass: inputs and results once each, and operations as torch counts them."""
    work = op.workload(case, dtype, "meta")
    leaves = [tensor.requires_grad_() for tensor in work.inputs.values()]
    with FlopCounterMode(display=False) as counter:
        output = work.call(*leaves, backend="reference")
        forward = counter.get_total_flops()
        torch.autograd.grad(output, leaves, torch.empty_like(output))
    backward = counter.get_total_flops() - forward
    inputs, result = sum(map(_bytes, leaves)), _bytes(output)
    return {
        "forward": (inputs + result, forward),
        "backward": (2 * inputs + result, backward),
        "both": (3 * inputs + 2 * result, forward + backward),
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Kernels of torch, of fixed size, that are timed in turn with each row, so that runs of different hours can be
# compared: other processes or a warm processor slow both. An anchor resembles the op, since products need not slow down
# when gathers do. Anchors fit into a core's own cache: out of the shared one, their times would vary by half.
ANCHORS = {
    "gather": "torch.nn.functional.grid_sample, float32, 32 channels, random places",
    "product": "torch.mm, float32, square",
}
ANCHOR_SIZE = {
    "gather": {"cpu": 96, "cuda": 1024},
    "product": {"cpu": 384, "cuda": 4096},
}  # rows and columns


def anchor(name: str, device: torch.device) -> Run:
    size = ANCHOR_SIZE[name][device.type]
    generator = torch.Generator().manual_seed(0)
    if name == "product":
        left, right = torch.randn(2, size, size, generator=generator).to(device)
        return functools.partial(torch.mm, left, right)
    image = torch.randn(1, 32, size, size, generator=generator).to(device)
    places = torch.rand(1, size, size, 2, generator=generator).to(device)
    return functools.partial(torch.nn.functional.grid_sample, image, 2 * places - 1, align_corners=False)
