# SPDX-License-Identifier: Apache-2.0
"""Shared by the launches of all Triton kernels."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
