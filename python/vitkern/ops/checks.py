# SPDX-License-Identifier: Apache-2.0
"""The checks of arguments. Each message names op and argument, the expected value and the actual one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from vitkern.ops import backends

# The types of an argument, by its kind in a schema.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "Tensor": ((Tensor,), "a tensor"),
    "Tensor?": ((Tensor, type(None)), "a tensor or None"),
    "str": ((str,), "a string"),
    "str?": ((str, type(None)), "a string or None"),
}


def check_types(op: str, arguments: Sequence[str], given: Sequence[object]) -> None:
    """Checks the types of tensors and names; `arguments` are in a schema's form."""
    for argument, one in zip(arguments, given):
        kind, name = argument.split("=")[0].split()
        types, expected = _TYPES.get(kind, ((object,), ""))
        if not isinstance(one, types):
            raise TypeError(f"{op}: {name} must be {expected}, got {type(one).__name__}")


Seen = tuple[torch.Size, torch.dtype, torch.device]


def seen(tensors: Sequence[Tensor | None]) -> tuple[Seen | None, ...]:
    """Shape, dtype and device of each tensor."""
    return tuple(
        tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors
    )


def refuse_changes(
    op: str, names: Sequence[str], before: Sequence[Seen | None], tensors: Sequence[Tensor | None]
) -> None:
    """Checks that the tensors are those that forward saw.

    Autograd detects changes in place. It does not detect ``tensor.data = other``, as in ``module.half()``, or hooks
    that unpack another tensor than they packed.
    """
    for name, was, now in zip(names, before, seen(tensors)):
        if was != now:
            raise RuntimeError(
                f"vitkern.{op}: {name} has changed since the forward pass: it was {_in_words(was)}, it is "
                f"{_in_words(now)}; backward needs the tensor that forward saw"
            )


def _in_words(it: Seen | None) -> str:
    return "None" if it is None else f"{list(it[0])} of {it[1]} on {it[2]}"


def check_output(op: str, name: str, tensor: Tensor, expected: Seen) -> None:
    """Checks that a tensor of the backward pass fits the tensors of the forward pass."""
    (it,) = seen((tensor,))
    if it != expected:
        raise ValueError(f"{op}: {name} must be {_in_words(expected)}, got {_in_words(it)}")


def check_memory(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Checks that each tensor lies within its storage, which may have been resized."""
    for name, tensor in zip(names, tensors):
        if tensor is None or tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        steps = zip(tensor.shape, tensor.stride())
        last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
        needed, there = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
        if there < needed:
            raise ValueError(
                f"{op}: {name} must have memory for {list(tensor.shape)} elements of {tensor.dtype}, {needed} bytes, "
                f"got a storage of {there} bytes: it has been resized"
            )


class Contract:
    """The checks of one op. They read no elements, and so work for real and fake tensors alike."""

    def __init__(self, op: str, leader: str) -> None:
        self.op, self.leader = op, leader  # the argument whose device all others must share

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        raise ValueError(f"{self.op}: {argument} must be {expected}, got {got}")

    def refuse(self, argument: str, expected: str, got: object) -> NoReturn:
        """Raises as fail(), for a wrong type."""
        raise TypeError(f"{self.op}: {argument} must be {expected}, got {got}")

    def check_dense(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """Checks that it is a tensor in plain memory, on the device of `like`."""
        if not isinstance(tensor, Tensor):
            self.refuse(name, "a tensor", type(tensor).__name__)
        if tensor.layout != torch.strided:
            self.refuse(name, "a dense tensor", tensor.layout)
        if tensor.device != like.device:
            self.fail(name, f"on {self.leader}'s device {like.device}", tensor.device)

    def check_floating(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """Checks that it is dense, on the device of `like`, and of any floating type."""
        self.check_dense(name, tensor, like)
        if not tensor.dtype.is_floating_point:
            self.refuse(name, "floating point", tensor.dtype)

    def check_kernel_dtype(self, name: str, tensor: Tensor) -> None:
        """Checks that it is dense, of a dtype that the kernels compute in."""
        self.check_dense(name, tensor, tensor)
        if tensor.dtype not in backends.DTYPES:
            self.refuse(name, "float32, float64, float16 or bfloat16", tensor.dtype)

    def check_whole(self, name: str, tensor: Tensor, like: Tensor) -> None:
        self.check_dense(name, tensor, like)
        if tensor.dtype != torch.int64:
            self.refuse(name, "int64", tensor.dtype)

    def check_shape(self, name: str, tensor: Tensor, shape: Sequence[int], form: str) -> None:
        """Checks that its shape is `shape`, which `form` writes in letters."""
        if tensor.shape != tuple(shape):
            self.fail(name, form, list(tensor.shape))
