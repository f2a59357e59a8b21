# SPDX-License-Identifier: Apache-2.0
"""Deformable-DETR's algorithm (benchmarks/baseline_msda.cuh), run and counted like our kernels."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.counts import counter
from benchmarks.counts.counter import Counted
from tests import emulated
from vitkern.cases import MsDeformAttnInputs

SIZES = ("pixels", "heads", "channels", "queries", "levels", "points", "outputs")
TENSORS = ("value", "shapes", "starts", "locations", "weights", "grad_output")
RESULTS = ("output", "grad_value", "grad_locations", "grad_weights")


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in SIZES] + [
        (name, ctypes.c_void_p) for name in (*TENSORS, *RESULTS)
    ]


@functools.cache
def path() -> Path:
    """The compiled library; if VITKERN_BASELINE_COUNTS names one, it is not built."""
    if built := os.environ.get("VITKERN_BASELINE_COUNTS"):
        return Path(built)
    folder = emulated.ROOT / "build" / "baseline-counts"
    folder.mkdir(parents=True, exist_ok=True)
    source = emulated.ROOT / "benchmarks" / "counts" / "baseline.cu"
    return emulated.compile_program(source, folder, watch="counts", flags=["-shared", f"-I{emulated.ROOT}"])


def run(inputs: MsDeformAttnInputs, grad_output: Tensor, **variables: object) -> tuple[Counted, list[Tensor]]:
    """Forward and backward of one image or more; counts and results: output and the gradients."""
    tensors = [tensor.contiguous() for tensor in (*inputs, grad_output)]
    value, _, _, locations, weights, _ = tensors
    _, pixels, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    results = [
        torch.empty_like(grad_output),
        torch.zeros_like(value),
        torch.empty_like(locations),
        torch.empty_like(weights),
    ]
    sizes = (pixels, heads, channels, queries, levels, points, grad_output.numel())
    given = Arguments(*sizes, *(tensor.data_ptr() for tensor in (*tensors, *results)))
    names = dict(zip((*TENSORS, *RESULTS), (*tensors, *results)))
    with counter.counting(path(), names, **variables) as counted:
        for kernel in ("baseline_forward", "baseline_backward"):
            getattr(counter.library(path()), kernel)(ctypes.byref(given))
    counted.filled += results[1].untyped_storage().nbytes()
    return counted, results
