# SPDX-License-Identifier: Apache-2.0
"""Running error analysis: numbers in float64, each with a bound on the deviation that another order of sums may cause.

A value that is not finite, with an error of 0, must be NaN or this infinity. An infinite error allows any result:
sums may overflow, or rounding decides the sign of a number that meets an infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Bounded(NamedTuple):
    value: Array
    error: Array  # of value's shape

    def at(self, where: Any) -> Bounded:
        return Bounded(self.value[where], self.error[where])

    def reshape(self, *shape: int) -> Bounded:
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def swap(self) -> Bounded:
        """The transpose: exchanges the last two axes."""
        return Bounded(self.value.swapaxes(-1, -2), self.error.swapaxes(-1, -2))

    def zero_unless(self, where: Array) -> Bounded:
        return Bounded(np.where(where, self.value, 0.0), np.where(where, self.error, 0.0))

    def may_differ(self, by: Array) -> Bounded:
        """The same values with a larger error; NaN adds an infinite error."""
        return Bounded(self.value, self.error + np.where(np.isnan(by), np.inf, by))

    def undecided(self, where: Array) -> Bounded:
        """The same values, where any result is right at these places."""
        return self.may_differ(np.where(where, np.inf, 0.0))


def product(a: Array, b: Array) -> Array:
    """The product; 0 if either factor is 0, even if the other is not finite."""
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def exact(value: Array | float) -> Bounded:
    value = np.asarray(value, dtype=np.float64)
    return Bounded(value, np.zeros_like(value))


def concatenate(parts: list[Bounded], axis: int) -> Bounded:
    return Bounded(*(np.concatenate(each, axis) for each in zip(*parts)))


def either(one: Bounded, other: Bounded) -> Bounded:
    """The same number computed in two ways; a kernel may use either."""
    error = np.maximum(one.error, other.error)
    same = np.isfinite(one.value) | (one.value == other.value) | (np.isnan(one.value) & np.isnan(other.value))
    return Bounded(one.value, np.where(same, error, np.inf))


@dataclass(frozen=True)
class Arithmetic:
    """Operations with error bounds: `unit` times the result, plus `smallest` for results that are flushed to zero."""

    name: str
    unit: float
    smallest: float
    largest: float

    def _settled(self, value: Array, error: Array, definite: Array) -> Bounded:
        """Gives an infinite error to numbers that may overflow; non-finite values are certain only if `definite`."""
        over = ~(np.abs(value) + error <= self.largest)
        error = np.where(over, np.inf, error)
        return Bounded(value, np.where(np.isfinite(value), error, np.where(definite, 0.0, np.inf)))

    def rounded(self, a: Bounded) -> Bounded:
        """The numbers rounded to this type, as intermediate results may be."""
        error = a.error + self.unit * (np.abs(a.value) + a.error) + self.smallest
        return self._settled(a.value, error, a.error == 0)

    def add(self, a: Bounded, b: Bounded) -> Bounded:
        value = a.value + b.value
        error = a.error + b.error + self.unit * (np.abs(value) + a.error + b.error)
        nan = _is_nan(a) | _is_nan(b)
        return self._settled(value, error, nan | (np.isfinite(a.error) & np.isfinite(b.error)))

    def minus(self, a: Bounded, b: Bounded) -> Bounded:
        return self.add(a, Bounded(-b.value, b.error))

    def mul(self, a: Bounded, b: Bounded) -> Bounded:
        value = a.value * b.value
        error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
        error = error + self.unit * np.abs(value) + np.where(value != 0, self.smallest, 0.0)
        both = (a.error == 0) & (b.error == 0) & ~(np.isfinite(a.value) & np.isfinite(b.value))
        signed = (np.isinf(a.value) & _has_sign(b)) | (np.isinf(b.value) & _has_sign(a))
        certain = np.isfinite(a.error) & np.isfinite(b.error)
        return self._settled(value, error, _is_nan(a) | _is_nan(b) | both | (certain & signed))

    def sum(self, terms: Bounded, axis: int | tuple[int, ...]) -> Bounded:
        """In any order."""
        axes = (axis,) if isinstance(axis, int) else axis
        count = int(np.prod([terms.value.shape[a] for a in axes], dtype=np.int64))
        finite = np.isfinite(terms.value)
        size = np.where(finite, np.abs(terms.value) + terms.error, 0.0).sum(axes)
        error = np.where(finite, terms.error, 0.0).sum(axes) + self._gamma(count) * size
        value = terms.value.sum(axes)
        error = np.where(size <= self.largest, error, np.inf)
        if finite.all():
            return Bounded(value, error)
        unsure = np.isinf(terms.error).any(axes) | np.isinf(error)
        nan = _is_nan(terms).any(axes)
        value = np.where(nan, np.nan, value)
        return Bounded(value, np.where(np.isfinite(value), error, 0.0) + np.where(unsure & ~nan, np.inf, 0.0))

    def _gamma(self, count: int) -> float:
        """The error of a sum of this many products, relative to the sum of their magnitudes."""
        return (count + 4) * self.unit

    def dot(self, a: Bounded, b: Bounded) -> Bounded:
        """a [..., N, K] and b [..., M, K]: sums over K, [..., N, M]."""
        if not (_all_finite(a) and _all_finite(b)):
            left = Bounded(*(each[..., :, None, :] for each in a))
            right = Bounded(*(each[..., None, :, :] for each in b))
            return self.sum(self.mul(left, right), -1)
        left, right = np.abs(a.value) + a.error, (np.abs(b.value) + b.error).swapaxes(-1, -2)
        size = left @ right
        error = np.abs(a.value) @ b.error.swapaxes(-1, -2) + a.error @ right
        count = a.value.shape[-1]
        error = error + self._gamma(count) * size + count * self.smallest * (size > 0)
        error = np.where(size <= self.largest, error, np.inf)
        return self._settled(a.value @ b.value.swapaxes(-1, -2), error, np.ones_like(error, dtype=bool))

    def scatter(self, terms: Bounded, index: Array, rows: int) -> Bounded:
        """Adds terms [N, D] to rows [rows, D] by index; terms with a negative index are dropped."""
        there = index >= 0
        terms, index = terms.at(there), index[there]
        shape = (rows, terms.value.shape[-1])
        finite = np.isfinite(terms.value)
        value, error, size, nan, unsure = (np.zeros(shape) for _ in range(5))
        counts = np.bincount(index, minlength=rows)[:, None]
        np.add.at(value, index, terms.value)
        np.add.at(error, index, np.where(finite, terms.error, 0.0))
        np.add.at(size, index, np.where(finite, np.abs(terms.value) + terms.error, 0.0))
        np.add.at(nan, index, _is_nan(terms))
        np.add.at(unsure, index, np.isinf(terms.error))
        error = error + (counts + 4) * self.unit * size
        unsure = ((unsure > 0) | ~(size <= self.largest)) & (nan == 0)
        value = np.where(nan > 0, np.nan, value)
        error = np.where(np.isfinite(value), error, 0.0) + np.where(unsure, np.inf, 0.0)
        return Bounded(value, error)

    def softmax(self, logits: Bounded, axis: int) -> Bounded:
        """exp(logit - largest), divided by its sum. For any errors of the logits, it lies between 0 and 1."""
        z, error = logits
        if z.shape[axis] == 0:
            return logits
        unsure = np.isinf(error).any(axis, keepdims=True)
        largest = np.max(np.where(np.isfinite(z), z, -np.inf), axis=axis, keepdims=True)
        none = ~np.isfinite(largest)  # all are -inf, or there is NaN or inf beside
        bad = (np.isnan(z) | (z == np.inf)).any(axis, keepdims=True) | none
        shifted = np.where(np.isfinite(z), z - np.where(none, 0.0, largest), -np.inf)
        raised = np.exp(shifted)
        relative = np.where(np.isfinite(z), error + self.unit * (2 * np.abs(shifted) + 16), 0.0)
        off = np.where(raised > 0, raised * np.expm1(np.minimum(relative, 700.0)), 0.0)
        off = off + np.where(np.isfinite(z), np.where(relative > 0, self.smallest, 0.0), 0.0)
        off = np.where(np.isfinite(z) & (relative > 1), np.maximum(off, 1.0), off)
        total, total_off = raised.sum(axis, keepdims=True), off.sum(axis, keepdims=True)
        total_off = total_off + self._gamma(z.shape[axis]) * total
        share = raised / np.where(total > 0, total, 1.0)
        left = np.maximum(total - total_off, self.smallest)
        most = np.maximum(share, 1 - share) + 16 * self.unit
        share_off = np.minimum((off + share * total_off) / left + 4 * self.unit * share, most)
        share_off = np.where(z == -np.inf, 0.0, share_off)
        value = np.where(bad, np.nan, share)
        return Bounded(value, np.where(unsure, np.inf, np.where(bad, 0.0, share_off)))


def _is_nan(a: Bounded) -> Array:
    return np.isnan(a.value) & (a.error == 0)


def _has_sign(a: Bounded) -> Array:
    return np.logical_not(np.abs(a.value) <= a.error)


def _all_finite(a: Bounded) -> bool:
    return bool(np.isfinite(a.value).all() and np.isfinite(a.error).all())


# For float64 the unit is twice its own: the oracle, in float64, is off by as much again.
FLOAT32 = Arithmetic("float32", 2.0**-24, 2.0**-126, 3.4e38)
FLOAT64 = Arithmetic("float64", 2.0**-51, 1e-300, 1e300)
FLOAT16 = Arithmetic("float16", 2.0**-11, 2.0**-25, 65504.0)
BFLOAT16 = Arithmetic("bfloat16", 2.0**-8, 2.0**-126, 3.38e38)
# Triton's interpreter truncates where a chip rounds, and converts subnormal numbers wrongly.
TRUNCATED = Arithmetic("truncated", 2.0**-7, 2.0**-122, 3.38e38)
OF = {each.name: each for each in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)}


def accumulator(dtype: str) -> Arithmetic:
    """The accumulator of kernels for a dtype."""
    return FLOAT64 if dtype == "float64" else FLOAT32
