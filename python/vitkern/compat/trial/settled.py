# SPDX-License-Identifier: Apache-2.0
"""Conditions with the same outcome in each later call as in a trial: the way that they do not take is no gap."""

from __future__ import annotations

from types import CodeType
from typing import TYPE_CHECKING, Any

from vitkern.compat.trial import functions
from vitkern.compat.trial.coverage import Leaf
from vitkern.compat.trial.specimen import PLAIN

if TYPE_CHECKING:
    from vitkern.compat.trial.judge import Trial

_CALCULATE = {"isinstance", "len", "int", "float", "bool", "str", "list", "tuple", "sum", "callable", "type"}


def is_settled(trial: Trial, code: CodeType, leaf: Leaf) -> bool:
    """Whether a condition reads only values that are compared at each call, so its outcome is that of the trial."""
    if leaf.kind == "attribute":
        known = {name for name, _ in trial.specimen.attributes()}
        return code in trial.methods and leaf.name in known | {"training", *trial.specimen.missing()}
    if leaf.kind == "optional":
        return _is_always_given(trial, code, leaf)
    if leaf.kind == "local" and _is_never_given(trial, code, leaf.name):
        return True
    if leaf.kind == "local":  # only configurations have strings, unless the code makes some
        return (
            bool(leaf.types)
            and leaf.types <= {str}
            and functions.is_argument(code, leaf.name)
            and not any(map(functions.makes_strings, trial.coverage.codes))
        )
    if leaf.kind == "global":
        return _is_constant(trial.coverage.codes[code], leaf.name)
    return False


def _is_never_given(trial: Trial, code: CodeType, name: str) -> bool:
    """Whether an argument of the forward has its default in all calls on the kernel: it has no role."""
    return (
        code is functions.code_of(trial.original)
        and functions.is_argument(code, name)
        and name not in trial.roles
    )


def _is_always_given(trial: Trial, code: CodeType, leaf: Leaf) -> bool:
    """Whether an argument is given, or left out, in all calls on the kernel as it was in the trial.

    The settings give and leave out the forward's own arguments. Arguments of helpers then depend on ways through the
    forward, all of which have been taken.
    """
    if not functions.is_argument(code, leaf.name):
        return False
    if code is functions.code_of(trial.original):
        return leaf.types == {type(None)} and leaf.name not in trial.roles
    return type(None) not in leaf.types or leaf.types == {type(None)}


def _is_constant(scope: dict[str, Any], name: str) -> bool:
    """Whether a name of a module is a plain value, a class, or a function of Python's own."""
    root, *rest = name.split(".")
    if root not in scope:
        return not rest and root in _CALCULATE
    return not rest and isinstance(scope[root], PLAIN)
