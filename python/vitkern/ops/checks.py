# SPDX-License-Identifier: Apache-2.0
"""What every op asks of its arguments, and how it says what is wrong: op, argument, expectation, what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from vitkern import backends

# What an argument has to be, by its kind in a schema.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "Tensor": ((Tensor,), "a tensor"),
    "Tensor?": ((Tensor, type(None)), "a tensor or None"),
    "str": ((str,), "a string"),
    "str?": ((str, type(None)), "a string or None"),
}


def check_types(op: str, arguments: Sequence[str], given: Sequence[object]) -> None:
    """That tensors and names are what they should be; `arguments` as a schema writes them."""
    for argument, one in zip(arguments, given):
        kind, name = argument.split("=")[0].split()
        types, expected = _TYPES.get(kind, ((object,), ""))
        if not isinstance(one, types):
            raise TypeError(f"{op}: {name} must be {expected}, got {type(one).__name__}")


class Contract:
    """The checks of one op. They read no elements, and so serve real and fake tensors alike."""

    def __init__(self, op: str, leader: str) -> None:
        self.op, self.leader = op, leader  # the argument beside which all others have to be

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        raise ValueError(f"{self.op}: {argument} must be {expected}, got {got}")

    def refuse(self, argument: str, expected: str, got: object) -> NoReturn:
        """What fail() is for a wrong type."""
        raise TypeError(f"{self.op}: {argument} must be {expected}, got {got}")

    def check_dense(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """That it is a tensor in plain memory, on the device of `like`."""
        if not isinstance(tensor, Tensor):
            self.refuse(name, "a tensor", type(tensor).__name__)
        if tensor.layout != torch.strided:
            self.refuse(name, "a dense tensor", tensor.layout)
        if tensor.device != like.device:
            self.fail(name, f"on {self.leader}'s device {like.device}", tensor.device)

    def check_floating(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """That it is dense, beside `like`, and of any floating type."""
        self.check_dense(name, tensor, like)
        if not tensor.dtype.is_floating_point:
            self.refuse(name, "floating point", tensor.dtype)

    def check_kernel_dtype(self, name: str, tensor: Tensor) -> None:
        """That it is dense, in a type that kernels compute in."""
        self.check_dense(name, tensor, tensor)
        if tensor.dtype not in backends.DTYPES:
            self.refuse(name, "float32, float64, float16 or bfloat16", tensor.dtype)

    def check_whole(self, name: str, tensor: Tensor, like: Tensor) -> None:
        self.check_dense(name, tensor, like)
        if tensor.dtype != torch.int64:
            self.refuse(name, "int64", tensor.dtype)

    def check_shape(self, name: str, tensor: Tensor, shape: Sequence[int], form: str) -> None:
        """That its shape is `shape`; `form` says so in letters."""
        if tensor.shape != tuple(shape):
            self.fail(name, form, list(tensor.shape))
