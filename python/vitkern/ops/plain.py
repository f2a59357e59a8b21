# SPDX-License-Identifier: Apache-2.0
"""backend="reference": a formula in plain torch, computed in the kernels' accumulator and rounded once like theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from vitkern.ops.autocast import without_autocast
from vitkern.ops.native import accumulator

Formula = Callable[..., Tensor]

_widens = True


def accumulated(formula: Formula, first: Tensor, *others: Tensor | None) -> Tensor:
    """The formula of these tensors, all widened, in the dtype of the first; None stays None."""
    wide = accumulator(first.dtype)
    kinds = {tensor.dtype for tensor in others if tensor is not None}
    if not _widens and kinds <= {first.dtype}:
        return formula(first, *others)
    leader = first.to(wide) if _widens else first
    with without_autocast(first.device.type):  # autocast would make products in 16 bits again
        output = formula(leader, *(None if tensor is None else tensor.to(wide) for tensor in others))
    return output.to(first.dtype)


def in_its_own_dtype(function: Formula) -> Formula:
    """The function with backend="reference" as torch computes it in 16 bits, roundings and all.

    That is the yardstick of checks: kernels may be off by twice as much.
    """

    @functools.wraps(function)
    def run(*arguments: Tensor) -> Tensor:
        global _widens
        before, _widens = _widens, False
        try:
            return function(*arguments)
        finally:
            _widens = before

    return run
