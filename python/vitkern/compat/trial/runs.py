# SPDX-License-Identifier: Apache-2.0
"""One run of a forward with its gradients, and the comparison of two runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkern.compat.trial.settings import Setting
from vitkern.compat.trial.specimen import Draws, Specimen, UnfitError
from vitkern.compat.trial.world import OnCard

# The difference that two orders of float32 operations may make, as a share of the largest value.
OUTPUT, GRADIENT = 1e-5, 1e-4


class Outcome(NamedTuple):
    """The results of a run."""

    shape: str  # of the result: a tensor, or a tuple or list of how many
    outputs: list[Any]
    gradients: dict[str, Tensor | None]  # of inputs, own parameters and what children returned
    calls: dict[str, list[Tensor]]  # the inputs of each child's calls


class Run(NamedTuple):
    """A run of the original, which the kernel has to equal."""

    setting: Setting
    inputs: dict[str, Any]
    theirs: Outcome
    exact: Outcome | None  # in float64, where the setting rounds to 16 bits

    def without_gradients(self) -> Run:
        """The run's outputs without gradients."""
        setting = self.setting._replace(gradients=False)
        return self._replace(setting=setting, theirs=self.theirs._replace(gradients={}, calls={}))


def run(
    forward: Callable[..., Any],
    specimen: Specimen,
    inputs: dict[str, Any],
    setting: Setting,
    dtype: torch.dtype,
) -> Outcome:
    """Runs forward(module, **inputs) and differentiates a fixed weighted sum of the results."""
    specimen.steep = (4.0 if setting.autocast else 20.0) if setting.steep else 0.0  # 16 bits of 20 say little
    leaves = specimen.prepare(dtype, setting.training)
    given: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.detach().clone()
            if value.is_floating_point():
                value = value.to(dtype).requires_grad_(setting.gradients)
                leaves[name] = value
            if setting.on_card and dtype == setting.dtype:
                value = value.as_subclass(OnCard)
        elif isinstance(value, list):
            value = list(value)
        given[name] = value
    buffers = {name: each.clone() for name, each in specimen.module._buffers.items() if each is not None}
    with _modes(setting, dtype), torch.set_grad_enabled(setting.gradients):
        specimen.listening = True
        try:
            result = forward(specimen.module, **given)
        finally:
            specimen.listening = False
    _require_unchanged(given, inputs, buffers, specimen)
    shape, outputs = _flat(result)
    leaves.update(specimen.outputs())
    gradients = _gradients(outputs, leaves) if setting.gradients else {}
    outputs = [_plain(each) for each in outputs]
    return Outcome(shape, outputs, gradients, specimen.calls())


def _require_unchanged(
    given: dict[str, Any], inputs: dict[str, Any], buffers: dict[str, Tensor], specimen: Specimen
) -> None:
    for name, value in inputs.items():
        before = value.to(given[name].dtype) if isinstance(value, Tensor) else value
        if not (_same(given[name], before) if isinstance(before, Tensor) else given[name] == before):
            raise UnfitError(f"its forward changes its argument {name}")
    for name, before in buffers.items():
        if not _same(specimen.module._buffers[name], before):
            raise UnfitError(f"its forward changes the buffer {name!r}")


def _same(now: Any, before: Tensor) -> bool:
    now = _plain(now)
    if before.is_floating_point():  # as bits, which are equal for NaN
        now, before = (each.view(_BITS[each.element_size()]) for each in (now, before))
    return torch.equal(now, before)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def _modes(setting: Setting, dtype: torch.dtype) -> Iterator[None]:
    on = setting.autocast and dtype == setting.dtype
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        yield


def _flat(result: Any) -> tuple[str, list[Any]]:
    if isinstance(result, Tensor):
        return "a tensor", [result]
    if type(result) in (tuple, list):
        return f"{_COUNTS.get(len(result), str(len(result)))} values in a {type(result).__name__}", list(
            result
        )
    return f"a {type(result).__name__}", []


_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def _plain(value: Any) -> Any:
    return value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else value


def _gradients(outputs: list[Any], leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = dict.fromkeys(leaves)
    draws = Draws(1)
    ends = [each for each in outputs if isinstance(each, Tensor) and each.requires_grad]
    sought = {name: each for name, each in leaves.items() if each.requires_grad}
    if not ends or not sought:
        return found
    weights = [draws.uniform(*each.shape).to(each.dtype) for each in ends]
    gradients = torch.autograd.grad(ends, list(sought.values()), weights, allow_unused=True)
    found.update((name, _plain(each)) for name, each in zip(sought, gradients))
    return found


def difference(theirs: Outcome, ours: Outcome, exact: Outcome | None, rounding: float) -> str | None:
    """The difference of two runs, or None. `exact` is the original's run in float64, if settings round to 16 bits."""
    if theirs.shape != ours.shape:
        return f"returns {theirs.shape}, the kernel {ours.shape}"
    for index, (a, b) in enumerate(zip(theirs.outputs, ours.outputs)):
        name = "" if len(theirs.outputs) == 1 else f" number {index + 1}"
        want = None if exact is None else exact.outputs[index]
        if reason := _apart(a, b, want, OUTPUT, rounding):
            return f"has an output{name} that {reason}"
    if reason := _calls_apart(theirs, ours, exact is None):
        return reason
    for name, mine in ours.gradients.items():
        want = None if exact is None else exact.gradients[name]
        if reason := _apart(theirs.gradients[name], mine, want, GRADIENT, rounding):
            return f"has a gradient of {name} that {reason}"
    return None


def _apart(theirs: Any, ours: Any, exact: Any, tolerance: float, rounding: float) -> str | None:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        same = (theirs is None and ours is None) or (type(theirs) is type(ours) and theirs == ours)
        names = ["missing" if each is None else "there" for each in (theirs, ours)]
        return None if same else f"is {names[0]}, the kernel's is {names[1]}"
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return f"is {list(theirs.shape)} {_name(theirs.dtype)}, the kernel's {list(ours.shape)} {_name(ours.dtype)}"
    if exact is None:
        return _differs(theirs, ours, tolerance)
    errors = [float((each.double() - exact).square().mean().sqrt()) for each in (theirs, ours)]
    # Some units of the 16 bits are allowed too: if one side happens to round well, twice nothing is nothing.
    unit = rounding * float(exact.square().mean().sqrt())
    if errors[1] > 2 * errors[0] + unit / 2:
        return f"is {errors[1] / max(errors[0], 1e-30):.2g} times as far from float64 as the original's"
    if errors[0] > 4 * errors[1] + 4 * unit:
        return f"is {errors[0] / max(errors[1], 1e-30):.2g} times as far from float64 as the kernel's"
    return None


def _differs(theirs: Tensor, ours: Tensor, tolerance: float) -> str | None:
    largest, apart = _largest(theirs), _largest(theirs - ours)
    if not math.isfinite(largest + apart):
        if not torch.equal(theirs.isnan(), ours.isnan()):
            return "is not a number in other places"
        theirs, ours = theirs.nan_to_num(), ours.nan_to_num()
        largest, apart = _largest(theirs), _largest(theirs - ours)
    share = apart / max(largest, 1e-30)
    return None if share <= tolerance else f"differs by {share:.2g} of its largest value"


def _largest(tensor: Tensor) -> float:
    """Its largest absolute value, NaN if one is NaN, 0 if it is empty."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(-float(low), float(high))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _calls_apart(theirs: Outcome, ours: Outcome, exact: bool) -> str | None:
    for name, wanted in theirs.calls.items():
        made = ours.calls[name]
        if len(wanted) != len(made):
            return f"calls {name} {len(wanted)} times, the kernel {len(made)} times"
        for a, b in zip(wanted, made):
            if a.shape != b.shape or (exact and _largest(a - b) > 1e-4 * _largest(a)):
                return f"calls {name} with another input"
    return None
