# SPDX-License-Identifier: Apache-2.0
"""Refuses code that is more than a function of its inputs, as far as its text shows: no trial could prove it."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING

from vitkern.compat.trial import functions, vocabulary
from vitkern.compat.trial.specimen import UnfitError, is_plain

if TYPE_CHECKING:
    from vitkern.compat.trial.judge import Trial

_WARN = {"warn", "warning", "print", "debug", "info", "error"}


def require_readable(trial: Trial) -> None:
    """Refuses code that is more than a function of its inputs, as far as its text shows."""
    if not functions.is_theirs(inspect.unwrap(trial.original)):
        raise UnfitError("its forward belongs to no known module, so its code cannot be followed")
    if device := functions.foreign_autocast(trial.original):
        raise UnfitError(f"its forward is decorated by autocast for {device}, which a CPU does not show")
    for name in ("__getattr__", "__getattribute__", "__setattr__"):
        owner = next(base for base in trial.kind.__mro__ if name in vars(base) or base is object)
        if functions.belongs(owner.__module__):
            raise UnfitError(f"its class defines {name}")
    others = {
        *trial.specimen.names(),
        *(part for each in trial.functions for part in functions.parts_of(each)),
    }
    read = frozenset(map(id, trial.functions))
    for function in trial.functions:
        if variable := functions.free_variable(function):
            raise UnfitError(
                f"its function {function.__name__} reads {variable!r}, a variable of another function"
            )
        if function.__name__ in _WARN:
            raise UnfitError(f"its function {function.__name__} has the name of one that warns")
        if reason := functions.impurity_of(function, read):
            raise UnfitError(f"its function {function.__name__} {reason}")
        code, scope = function.__code__, function.__globals__.keys()
        if unknown := vocabulary.unknown(code, others | scope, is_method=code in trial.methods):
            raise UnfitError(f"its function {function.__name__} uses {unknown!r}, whose effect no trial sees")
        if number := functions.out_of_reach(function):
            raise UnfitError(
                f"its function {function.__name__} names {number}, larger than any size of a trial"
            )


def require_no_free_comparison(trial: Trial) -> None:
    """Refuses comparisons that are numbers to compute with, in code that has run: no way through it shows them."""
    for function in trial.functions:
        for code, offset, line in functions.free_comparisons(function.__code__):
            if trial.coverage.ran(code, offset):
                raise UnfitError(f"its function {function.__name__} computes with a comparison: line {line}")


def require_plain_class(trial: Trial) -> None:
    """Refuses code that reads anything from its class except functions and values that cannot change."""
    for name in trial.specimen.reads - vars(trial.layer).keys():
        owner = next((base for base in trial.kind.__mro__ if name in vars(base)), object)
        value = vars(owner).get(name)
        fixed = isinstance(value, FunctionType) or (
            is_plain(value) and not isinstance(value, (list, dict, set))
        )
        if functions.belongs(owner.__module__) and not fixed:
            raise UnfitError(
                f"its forward reads {name!r} of its class, a {type(value).__name__} that may change"
            )
