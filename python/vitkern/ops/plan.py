# SPDX-License-Identifier: Apache-2.0
"""The arguments of an op as one record, and the plan for calls with such arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

Inputs = tuple[Any, ...]  # a NamedTuple: tensors first, options with defaults after them, the backend last
Record = TypeVar("Record", bound=Inputs)
Tensors = tuple[Tensor | None, ...]
Outputs = Tensor | tuple[Tensor, ...]
Spec = tuple[Sequence[int], torch.dtype]  # of an output
Needed = tuple[bool, ...]  # a flag for each gradient: whether it is needed
Gradients = Sequence[Tensor | None]

_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int] | None: "int[]?",
    str: "str",
    str | None: "str?",
    float: "float",
    bool: "bool",
}


def schema_of(record: Callable[..., Inputs]) -> tuple[list[str], list[str], tuple[object, ...]]:
    """Tensors and options in the form of torch.library, and the defaults of the options."""
    kinds, fields = get_type_hints(record), inspect.signature(record).parameters.values()
    options = [field for field in fields if field.default is not field.empty]
    return (
        [f"{_KINDS[kinds[field.name]]} {field.name}" for field in fields if field not in options],
        [f"{_KINDS[kinds[field.name]]} {field.name}={field.default!r}" for field in options],
        tuple(field.default for field in options),
    )


class Plan(NamedTuple):
    """The functions for calls of one signature, on contiguous tensors of the dtypes that the kernels read."""

    forward: Callable[..., Outputs]  # of the tensors
    # Takes the flags of the needed gradients, a contiguous grad_output, the tensors and the kept outputs; returns a
    # gradient or None for each differentiable tensor.
    backward: Callable[..., Gradients]


def plan_of(
    inputs: Record,
    tensors: int,
    forward: Callable[[Record], Outputs],
    backward: Callable[..., Gradients],
) -> Plan:
    """The plan of launchers that read their arguments by name; backward's come before forward's kept outputs."""
    record: Callable[..., Record] = type(inputs)
    options = inputs[tensors:]

    def run(*given: Tensor | None) -> Outputs:
        return forward(record(*given, *options))

    def differentiate(needed: Needed, grad_output: Tensor, *given: Tensor | None) -> Gradients:
        return backward(needed, grad_output, record(*given[:tensors], *options), *given[tensors:])

    return Plan(run, differentiate)
