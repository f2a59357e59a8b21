# SPDX-License-Identifier: Apache-2.0
"""Copies of functions with their own globals: values in them may be replaced, and no module changes."""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

from vitkern.compat.trial.functions import content, is_applied, is_theirs, undone
from vitkern.compat.trial.purity import names_of


class Copies:
    """Copies of the user's functions, each made once. Copies from one module share their globals, as originals do."""

    def __init__(self) -> None:
        self._globals: dict[int, dict[str, Any]] = {}
        self.originals: dict[int, dict[str, Any]] = {}  # globals of a module, by the id of their copy
        self._copies: dict[int, Any] = {}
        self._kept: list[Any] = []  # objects whose ids are keys above

    def function(self, function: Any) -> Any:
        """A copy of the function, if it is the user's."""
        function = undone(function)
        if not isinstance(function, FunctionType) or not (is_theirs(function) or self._wraps(function)):
            return function
        if id(function) not in self._copies:
            copied = FunctionType(
                function.__code__,
                self._globals_of(function) if is_theirs(function) else function.__globals__,
                function.__name__,
                self._tuple(function.__defaults__),
                tuple(self._cell(cell) for cell in function.__closure__ or ()) or None,
            )
            named = function.__kwdefaults__
            copied.__kwdefaults__ = named and {name: self._value(each) for name, each in named.items()}
            copied.__dict__.update(function.__dict__)
            self._remember(function, copied)
        return self._copies[id(function)]

    def _remember(self, key: Any, value: Any) -> None:
        self._kept.append(key)
        self._copies[id(key)] = value

    def _tuple(self, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if values is None else tuple(map(self._value, values))

    def _wraps(self, function: FunctionType) -> bool:
        contents = (content(cell) for cell in function.__closure__ or ())
        return any(
            is_applied(each) or (isinstance(each, FunctionType) and (is_theirs(each) or self._wraps(each)))
            for each in contents
        )

    def _cell(self, cell: CellType) -> CellType:
        inner = content(cell)
        if is_applied(inner):
            return CellType(self._value(inner))
        return CellType(self.function(inner)) if isinstance(inner, FunctionType) else cell

    def _globals_of(self, function: FunctionType) -> dict[str, Any]:
        """The globals of the function's module, shared by its functions, with the values that code names replaced."""
        theirs = function.__globals__
        if id(theirs) not in self._globals:
            self._kept.append(theirs)
            copied = self._globals[id(theirs)] = dict(theirs)
            self.originals[id(copied)] = theirs
        ours = self._globals[id(theirs)]
        for name in names_of(function.__code__):
            if name in theirs and ours[name] is theirs[name]:
                ours[name] = self._value(theirs[name], name)
            elif name not in ours:
                ours.update(self._missing(name))
        return ours

    def _missing(self, name: str) -> dict[str, Any]:
        """Substitutes for a name that a module lacks."""
        return {}

    def _value(self, value: Any, name: str = "") -> Any:
        """The substitute for a value in the globals, defaults or closure of code."""
        raise NotImplementedError
