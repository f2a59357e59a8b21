# SPDX-License-Identifier: Apache-2.0
"""The rule for right results: the error against float64 is at most twice that of plain torch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TIMES = 2.0
# Additional error, in units in the last place of the largest value: if plain torch happens to be exact, a rounding is
# no mistake, and sums of the same terms in another order differ by some units of the accumulator.
UNITS = {torch.float64: 32, torch.float32: 16, torch.float16: 1, torch.bfloat16: 1}
# As a share of the largest gradient: a zero instead of a larger one is a missing gradient.
MISSING = 1e-3


@dataclass(frozen=True)
class Verdict:
    """The verdict on a result of an op: the output, or the gradient of one input."""

    error: float
    allowed: float
    complaint: str | None
    times: float = TIMES

    @property
    def ratio(self) -> float:
        """The error in units of plain torch's own error and of the allowed rounding; `times` is the limit."""
        return self.times * self.error / self.allowed if self.error else 0.0


def max_error(actual: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    return (actual.double() - exact.double())[finite].abs().max().item() if finite.any() else 0.0


def judge(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    times: float = TIMES,
    units: Mapping[torch.dtype, int] = UNITS,
    tolerance_factor: float = 1.0,
    extra_tolerance: float = 0.0,
    gradient: bool = False,
) -> Verdict:
    """Compares `actual` with plain torch in the same dtype and the formula in float64.

    `tolerance_factor` multiplies the limit.
    """

    def wrong(complaint: str) -> Verdict:
        return Verdict(math.inf, 1.0, complaint)

    if actual.shape != exact.shape:
        return wrong(f"has shape {list(actual.shape)}, expected {list(exact.shape)}")
    if actual.dtype != plain.dtype:
        return wrong(f"is {actual.dtype}, expected {plain.dtype}")
    if not torch.equal(actual.isnan(), exact.isnan()):
        return wrong(
            f"has {_count(actual.isnan())} NaN, expected {_count(exact.isnan())}, or in other places"
        )
    infinite = exact.isinf()
    if not torch.equal(actual[infinite].double(), exact[infinite]):
        return wrong("has other infinities than expected, or in other places")
    finite = exact[exact.isfinite()].abs()
    unit = torch.finfo(actual.dtype).eps * (finite.max().item() if finite.numel() else 0.0)
    error, usual = max_error(actual, exact), max_error(plain, exact)
    extra_tolerance = extra_tolerance if math.isfinite(extra_tolerance) else 0.0
    allowed = tolerance_factor * (times * usual + units[actual.dtype] * unit + extra_tolerance)
    complaint = None
    if not error <= allowed:
        complaint = f"is off by {error:.2g}, allowed are {allowed:.2g} (plain torch: {usual:.2g})"
    elif gradient and (zeros := missing(actual, plain, exact, max(MISSING, torch.finfo(actual.dtype).eps))):
        complaint = f"is zero in {zeros} places where it should not be"
    return Verdict(error, allowed, complaint, times)


def _count(where: Tensor) -> str:
    return str(int(where.sum())) if where.any() else "no"


def missing(actual: Tensor, plain: Tensor, exact: Tensor, least: float = MISSING) -> int:
    """The number of zeros instead of larger gradients, where plain torch has none: terms of 16 bits may cancel.

    In a user's kernels, gradients below a rounding of the largest may cancel too, so `least` is that or more.
    """
    if exact.numel() == 0:
        return 0
    large = exact.abs() > least * exact.abs().max()
    return int((large & (actual == 0) & (plain != 0)).sum())
