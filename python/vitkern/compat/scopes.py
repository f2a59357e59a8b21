# SPDX-License-Identifier: Apache-2.0
"""The names outside of a layer that its code reads: a proof depends on their values at the time of the trial."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from vitkern.compat.trial.flow import instructions
from vitkern.compat.trial.functions import belongs, content, is_core, is_harmless, names_in, undone
from vitkern.compat.trial.judge import Judgement
from vitkern.compat.trial.purity import names_of

Function = Callable[..., Any]

ABSENT = object()


class Scope:
    """Names in a namespace that a proof depends on: values that they must have, and names that must be missing."""

    def __init__(self, owner: Any, values: dict[str, Any]) -> None:
        self.owner = owner
        self.space: Mapping[str, Any] = vars(owner) if isinstance(owner, type) else owner
        self.values = {name: value for name, value in values.items() if value is not ABSENT}
        self.absent = tuple(name for name, value in values.items() if value is ABSENT)
        self.pick = operator.itemgetter(*self.values) if self.values else _nothing
        self.expected = self.pick(self.values)

    def changed(self) -> str | None:
        """The first name with another value."""
        for name, then in self.values.items():
            now = self.space.get(name)
            if now is not then and undone(now) is not undone(then):
                return name
        # Patched by this package meanwhile: it is still the same code.
        self.values = {name: self.space[name] for name in self.values}
        self.expected = self.pick(self.values)
        return None


def _nothing(_: Any) -> None:
    """The values of no names."""


def scopes_of(layer: nn.Module, judgement: Judgement) -> Iterator[Scope]:
    """The names outside of the layer that the code has read."""
    spaces: dict[int, tuple[Any, dict[str, Any]]] = {}

    def note(owner: Any, name: str, value: Any) -> None:
        spaces.setdefault(id(owner), (owner, {}))[1][name] = value

    for code, scope in judgement.codes:
        for name in names_of(code):
            value = scope.get(name)
            if name not in scope:
                continue
            note(scope, name, value)
            if isinstance(value, type) and belongs(value.__module__) and not issubclass(value, nn.Module):
                for part in ("forward", "backward", "apply", "setup_context"):
                    if part in vars(value) or issubclass(value, torch.autograd.Function):
                        note(value, part, vars(value).get(part, ABSENT))
            elif isinstance(value, ModuleType) and belongs(value.__name__):
                for part in set(code.co_names) & set(vars(value)):
                    note(vars(value), part, vars(value)[part])
    cores = [type(child) for child in layer.children() if is_core(child)]
    mentioned = set().union(*(names_in(code) for code, _ in judgement.codes))
    for kind, names in [(type(layer), judgement.reads), *((core, mentioned) for core in cores)]:
        own = vars(layer).keys() | layer._modules.keys() | layer._parameters.keys() | layer._buffers.keys()
        for name in sorted({*names, "forward"} - own):
            for base in kind.__mro__:  # the first that has it, and those before, which must not get it
                if not belongs(base.__module__):
                    break
                note(base, name, vars(base).get(name, ABSENT))
                if name in vars(base):
                    break
    for owner, values in spaces.values():
        yield Scope(owner, values)


def looked_at(function: Function) -> set[str] | None:
    """The names of further keyword arguments that a forward reads from ``**kwargs``; None if it may read any.

    Decorators of known libraries read those that they rename, whose names are in their closures.
    """
    names: set[str] = set()
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if not is_harmless(function):
            return None
        for value in map(content, function.__closure__ or ()):
            names |= {value} if isinstance(value, str) else set(value) if isinstance(value, dict) else set()
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return None
    name = code.co_varnames[
        code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    ]
    used = name in code.co_cellvars or any(
        each.opname.startswith("LOAD_") and _names_it(each.argval, name) for each in instructions(code)
    )
    return None if used else names


def _names_it(value: Any, name: str) -> bool:
    return value == name or (isinstance(value, tuple) and name in value)
