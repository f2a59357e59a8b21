# SPDX-License-Identifier: Apache-2.0
"""Results against their bounds, number by number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tools.fuzzing.arithmetic import OF, TRUNCATED, Array, Bounded
from tools.fuzzing.call import truncates
from tools.fuzzing.draw import Case

_MOST = 5  # wrong numbers of a result that are told


@dataclass(frozen=True)
class Wrong:
    result: str
    element: tuple[int, ...]
    got: float
    expected: float
    bound: float

    def __str__(self) -> str:
        at = list(self.element)
        return f"{self.result}{at}: got {self.got!r}, expected {self.expected!r} within {self.bound:.3g}"


def rounded(value: Array, dtype: torch.dtype) -> Array:
    """The values rounded to this type, or infinite if out of range, by torch's conversion."""
    return torch.from_numpy(np.ascontiguousarray(value)).to(dtype).double().numpy()


def limits(known: Bounded, dtype: torch.dtype) -> tuple[Array, Array]:
    """The least and the largest allowed result: rounding keeps the order of numbers."""
    error = known.error * (1 + 1e-9)
    return rounded(known.value - error, dtype), rounded(known.value + error, dtype)


def compare(name: str, got: Tensor, known: Bounded, dtype: torch.dtype) -> list[Wrong | str]:
    if got.dtype != dtype:
        return [f"{name} is {got.dtype}, expected {dtype}"]
    if got.numel() != known.value.size:
        return [f"{name} has shape {list(got.shape)}, expected {list(known.value.shape)}"]
    numbers = got.double().resolve_neg().numpy().reshape(known.value.shape)
    with np.errstate(all="ignore"):
        low, high = limits(known, dtype)
        right = (low <= numbers) & (numbers <= high)
    right |= np.isinf(known.error) | (np.isnan(known.value) & np.isnan(numbers))
    if name.startswith("gradient"):
        # Infinity times a sum is infinite, the sum of its products may be NaN: a gradient may be either.
        right |= ~(np.isfinite(known.value) | np.isfinite(numbers))
    wrong = np.flatnonzero(~np.asarray(right))
    flat = [np.asarray(each).reshape(-1) for each in (numbers, *known)]
    found: list[Wrong | str] = []
    for at in wrong[:_MOST]:
        element = tuple(int(i) for i in np.unravel_index(at, numbers.shape)) if numbers.shape else ()
        found.append(Wrong(name, element, *(float(each[at]) for each in flat)))
    if len(wrong) > _MOST:
        found.append(f"{name}: {len(wrong)} of {numbers.size} numbers are wrong")
    return found


def through(case: Case, name: str, known: Bounded, dtype: torch.dtype) -> Bounded:
    """The gradient of an input with another type than x may be rounded to x's type first."""
    parameter = case.op in ("adapter_bottleneck", "token_pool") and name not in ("x", "scale", "residual")
    return OF[case.dtype].rounded(known) if parameter and dtype != case.first.dtype else known


def judge(case: Case, results: dict[str, Tensor], expected: dict[str, Bounded]) -> list[Wrong | str]:
    """The faults of the results; empty if there are none."""
    found: list[Wrong | str] = []
    shapes = {"output": case.grad_output, "attention": case.first}
    for name in ("output", *case.wanted, *(["attention"] if "attention" in results else [])):
        if name not in results:
            found.append(f"the gradient of {name} is missing")
            continue
        like = shapes[name] if name in shapes else case.tensor(name)
        if name != "attention" and results[name].shape != like.shape:
            found.append(f"{name} has shape {list(results[name].shape)}, expected {list(like.shape)}")
            continue
        known = expected[name] if name in shapes else through(case, name, expected[name], like.dtype)
        if truncates(case):
            known = TRUNCATED.rounded(known)
        title = name if name in shapes else f"gradient of {name}"
        found += compare(title, results[name], known, like.dtype)
    return found


def unsure(case: Case, expected: dict[str, Bounded]) -> tuple[int, int]:
    """The number of results that may have any value, and the number of all results."""
    names = ["output", *case.wanted]
    errors = [expected[name].error for name in names]
    return sum(int(np.isinf(error).sum()) for error in errors), sum(error.size for error in errors)
