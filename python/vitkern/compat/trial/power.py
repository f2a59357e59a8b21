# SPDX-License-Identifier: Apache-2.0
"""Whether a trial could have failed. If its inputs have no effect, or a wrong kernel passes, it proves nothing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from vitkern.compat.trial import wrong
from vitkern.compat.trial.specimen import UnfitError

if TYPE_CHECKING:
    from vitkern.compat.forms import Candidate
    from vitkern.compat.trial.judge import Trial
    from vitkern.compat.trial.runs import Run


def require_sensitive(trial: Trial) -> None:
    """Requires that every input and child changes the result, in runs where kernel and original agree."""
    called = {name for each in trial.runs for name, inputs in each.theirs.calls.items() if inputs}
    for name, child in trial.specimen.children.items():
        if child._sizes is not None and name not in called:
            raise UnfitError(f"{name} has no effect on its result, so that no trial can prove what it does")
    names: dict[str, None] = {}
    moved: set[str] = set()
    for each in trial.runs:
        names.update(dict.fromkeys(each.theirs.gradients))
        if each.setting.exact:
            moved |= {
                name
                for name, found in each.theirs.gradients.items()
                if found is not None and bool(found.any())
            }
    for name in names:
        if name not in moved and not _moves(trial, name):
            raise UnfitError(f"{name} has no effect on its result, so that no trial can prove what it does")
    if "mask" in trial.roles.values() and not _mask_moves(trial):
        raise UnfitError("its mask has no effect on its result")


def _moves(trial: Trial, name: str) -> bool:
    """Whether another input, or another bias of a child, changes the result, in the kernel as in the original."""
    each = next(each for each in trial.runs if each.setting.exact and name in each.theirs.gradients)
    inputs, child = (
        each.inputs,
        None if name in each.inputs else trial.specimen.children.get(name.partition("'")[0]),
    )
    if name in inputs:
        inputs = {**inputs, name: inputs[name].roll(1, 1)}
    elif child is None or child._sizes is None:
        return False
    with contextlib.nullcontext() if child is None else child.shifted():
        other = trial.original_run(each.setting, inputs)
        return _agrees(trial, each, inputs, other) and _differs(each, other)


def _agrees(trial: Trial, run: Run, inputs: dict[str, Any], theirs: Any) -> bool:
    moved = run._replace(inputs=inputs, theirs=theirs, exact=None)
    return any(trial.compare(candidate, moved) is None for candidate in trial.candidates)


def _differs(run: Run, other: Any) -> bool:
    return not torch.equal(other.outputs[0], run.theirs.outputs[0])


def _mask_moves(trial: Trial) -> bool:
    masked = [each for each in _quickest_first(trial) if each.setting.masked]
    for each in masked:
        without = {name: value for name, value in each.inputs.items() if trial.roles[name] != "mask"}
        if _differs(each, trial.original_run(each.setting, without)):
            return True
    return not masked  # without masked runs there is nothing to show


def _quickest_first(trial: Trial) -> list[Run]:
    """The runs in float32; runs whose children had the fewest numbers to map come first."""
    return sorted((each for each in trial.runs if each.setting.exact), key=_amount)


def _amount(run: Run) -> int:
    return sum(each.numel() for calls in run.theirs.calls.values() for each in calls)


def require_wrong_forms_to_fail(trial: Trial, candidate: Candidate) -> None:
    """Requires that the inputs tell seven wrong kernels from the right one."""
    for name in wrong.NAMES:
        if name in _alike(trial):
            continue
        form = candidate.form._replace(forward=wrong.twisted(name, candidate.form.forward))
        runs = (each.without_gradients() for each in _quickest_first(trial))
        if all(trial.compare(candidate._replace(form=form), each) is None for each in runs):
            raise UnfitError(f"its trial cannot tell a wrong kernel ({name}) from the right one")


def _alike(trial: Trial) -> set[str]:
    """The wrong forms that are right for this layer."""
    alike = set()
    if trial.sizes.levels == 1:
        alike.add("weights normalised a level")
    if trial.sizes.heads == 1:
        alike.add("heads in another order")
    if "discrete" in (getattr(trial.layer, "method", None), getattr(trial.layer, "decoder_method", None)):
        alike |= {"align_corners", "border padding"}
    return alike
