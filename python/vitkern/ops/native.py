# SPDX-License-Identifier: Apache-2.0
"""What launches of the compiled kernels share, whatever the op: the module, codes, addresses, streams.

native_<op>.py goes from an op's tensors to the kernels. Callers have checked and made everything contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitkern import _C

# Mirrors csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# The module whose *_cuda functions are called: the emulated twin of _C in tests (csrc/emulator).
cuda_module: ModuleType = _C


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the kernels add up in: double for double, float for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def current_stream(device: torch.device) -> Callable[[], int]:
    """What gives the stream that work on a device is to join; 0 on the CPU, where only the emulator comes by."""
    if device.type != "cuda":
        return int
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def cuda_target(tensor: Tensor) -> tuple[int, int]:
    """Device ordinal and current stream; zeros on the CPU."""
    return (tensor.get_device() if tensor.is_cuda else 0), current_stream(tensor.device)()


def workspace(size: int, device: torch.device) -> Tensor:
    """So many bytes for a kernel's intermediate results."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def addresses(tensors: Sequence[Tensor | None]) -> Any:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
