# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: the device and stream of their calls, and the specifications of outputs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vitkern import _C
from vitkern.ops import private

# The module whose CUDA kernels are called: the emulated twin of _C in tests (csrc/emulator).
cuda_module: ModuleType = _C


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the kernels' sums: double for double, float for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def host(backend: str, device: torch.device) -> _C.Host:
    """The object that calls a backend's kernels on a device."""
    borrow = private.borrow()
    if backend == "cpu":
        return _C.Host(cuda=False, borrow=borrow, device=0, where=torch.get_num_threads, workspace=_workspace)
    ordinal = 0 if device.type != "cuda" else device.index  # the emulator's tensors are on the CPU
    where = int if device.type != "cuda" else private.current_stream(ordinal)
    made: _C.Host = cuda_module.Host(
        cuda=True, borrow=borrow, device=ordinal, where=where, workspace=_workspace
    )
    return made


def specs(dtype: torch.dtype, *outputs: _C.Spec) -> list[_C.Spec]:
    """Specifications of outputs for a call whose first tensor is of this dtype."""
    return [(it[0], None if it[1] == dtype else it[1], len(it) == 3 and it[2]) for it in outputs]
