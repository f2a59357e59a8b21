# SPDX-License-Identifier: Apache-2.0
"""The code that the launches of all Triton kernels share."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context with the tensor's device as the current one, where launches go."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
