# SPDX-License-Identifier: Apache-2.0
"""Layers of no known form, or that do more than this op: their sampling function runs on a kernel, unfused.

Such a layer gets a subclass with copies of its methods, whose globals are their own: another model keeps its function.
"""

from __future__ import annotations

import functools
import inspect
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from vitkern.compat.cores import Core, core_of
from vitkern.compat.scopes import ABSENT, Scope
from vitkern.compat.trial import functions
from vitkern.compat.trial.copies import Copies
from vitkern.compat.trial.flow import instructions
from vitkern.compat.trial.purity import names_of

Function = Callable[..., Any]


class Held(NamedTuple):
    """The cores that a layer holds, and their names in it."""

    of_code: tuple[tuple[str, Core], ...]  # in the globals and defaults of its methods
    own: tuple[tuple[str, Core], ...]  # in its attributes

    def cores(self) -> Iterator[tuple[str, Core]]:
        yield from (*self.of_code, *self.own)


def held_by(layer: nn.Module) -> Held:
    """The cores that the code of a layer may call."""
    own = [(name, core) for name, value in vars(layer).items() if (core := core_of(value)) is not None]
    of_code: dict[str, Core] = {}
    for function in functions.reachable(layer, type(layer)):
        scope = function.__globals__
        found = {name: scope[name] for name in names_of(function.__code__) if name in scope}
        outer = core_of(function)
        for name, value in [*found.items(), *_defaults(function)]:
            if (outer is None or not outer.roles) and (core := core_of(value)) is not None:
                of_code[name] = core
    return Held(tuple(sorted(of_code.items(), key=lambda pair: pair[0])), tuple(own))


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            yield name, parameter.default


class _Swapped(Copies):
    """Copies of the functions that lead to a core; the copies find its replacement."""

    def __init__(self, replaced: Mapping[Core, Function]) -> None:
        super().__init__()
        self._replaced = replaced
        self._leading: dict[int, bool] = {}
        self.scopes: list[Scope] = []

    def leads(self, function: FunctionType) -> bool:
        """Whether a function of the user's project may call a core, so that it has to be copied."""
        if id(function) not in self._leading:
            self._leading[id(function)] = False  # a recursive call alone does not lead to a core
            scope = function.__globals__
            values = [scope.get(name) for name in names_of(function.__code__)]
            values += [functions.content(cell) for cell in function.__closure__ or ()]
            values += [value for _, value in _defaults(function)]
            self._leading[id(function)] = any(map(self._counts, values))
        return self._leading[id(function)]

    def copied(self) -> list[FunctionType]:
        """The functions that have copies."""
        return [each for each in self._kept if isinstance(each, FunctionType)]

    def _counts(self, value: Any) -> bool:
        value = functions.undone(value)
        return core_of(value) in self._replaced or (functions.is_theirs(value) and self.leads(value))

    def _value(self, value: Any, name: str = "") -> Any:
        core = core_of(value)
        if core is not None and core in self._replaced:
            return self._replaced[core]
        leads = functions.is_theirs(value) and self.leads(value)
        return self.function(value) if leads else value

    def _globals_of(self, function: FunctionType) -> dict[str, Any]:
        theirs, code = function.__globals__, function.__code__
        if reason := _depends_on_module(code):
            raise NoCopyError(reason)
        self.scopes.append(Scope(theirs, {name: theirs.get(name, ABSENT) for name in names_of(code)}))
        ours = super()._globals_of(function)
        ours.pop("__name__", None)  # dynamo would use it to look in the module itself
        return ours


class NoCopyError(Exception):
    """Code that would behave differently in a copy."""


def _depends_on_module(code: CodeType) -> str | None:
    for each in functions.codes_in(code):
        for step in instructions(each):
            if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                return f"{code.co_name} changes the global {step.argval!r}"
            if step.opname == "IMPORT_NAME" or step.argval == "__name__":
                return f"{code.co_name} imports, or asks for its module's name, which a copy has not"
    return None


def _methods_on_kernels(layer: nn.Module, held: Held, replaced: Mapping[Core, Function]) -> dict[str, Any]:
    """The namespace of a subclass whose methods call the replacements of cores."""
    kind: Any = type(layer)
    copies = _Swapped(replaced)
    methods = {name: copies.function(each) for name, each in functions.methods_of(kind) if copies.leads(each)}
    namespace: dict[str, Any] = {
        name: _property(name, vars(layer)[name], replaced[core])
        for name, core in held.own
        if core in replaced
    }
    return {
        **namespace,
        **{name: _guarded(kind, name, each, copies) for name, each in methods.items()},
    }


def _guarded(kind: Any, name: str, copied: Function, copies: _Swapped) -> Function:
    """A method of the copies. After a change of the class's own method, or of what it uses, that one runs."""
    original = getattr(kind, name)
    scopes, codes = copies.scopes, [(each, each.__code__) for each in copies.copied()]
    held = [(scope.owner, key, value) for scope in scopes for key, value in scope.values.items()]
    # Dynamo cannot compare autograd functions, except by their ids.
    classes = [(owner, key, id(value)) for owner, key, value in held if functions.is_applied(value)]
    others = [each for each in held if not functions.is_applied(each[2])]

    def changed() -> str | None:
        if getattr(kind, name) is not original:
            return name
        for owner, key, value in others:
            if owner.get(key) is not value:
                return key
        for owner, key, number in classes:
            if id(owner.get(key)) != number:
                return key
        for scope in scopes:
            for key in scope.absent:
                if key in scope.owner:
                    return key
        return next((function.__name__ for function, code in codes if function.__code__ is not code), None)

    @functools.wraps(copied)
    def method(self: nn.Module, *positional: Any, **named: Any) -> Any:
        what = changed()
        if what is None:
            return copied(self, *positional, **named)
        _warn(kind, what)
        return getattr(kind, name)(self, *positional, **named)

    method.replaces = functions.undone(original)  # type: ignore[attr-defined]
    method.changed = changed  # type: ignore[attr-defined]
    return method


_warned: set[tuple[type, str]] = set()


def _warn(kind: Any, name: str) -> None:
    if not torch.compiler.is_compiling() and (kind, name) not in _warned:
        _warned.add((kind, name))
        warnings.warn(
            f"vitkern: {kind.__name__} runs its own code: {name!r} has changed since the patch",
            stacklevel=4,
        )


def _property(name: str, tried: Any, sample: Function) -> property:
    """An attribute that holds a core: the layer keeps it, and its code gets the kernel until the attribute changes."""

    def get(self: nn.Module) -> Any:
        if name not in self.__dict__:
            raise AttributeError(name)  # torch then looks for a child of that name
        now = self.__dict__[name]
        return sample if now is tried or _same(now, tried) else now

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def remove(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return property(get, put, remove)


def _same(now: Any, tried: Any) -> bool:
    if not isinstance(now, functools.partial) or not isinstance(tried, functools.partial):
        return False
    return now.func is tried.func and now.args == tried.args and now.keywords == tried.keywords


_Key = tuple[Any, Held, frozenset[tuple[Core, Function]]]
_latest: dict[_Key, Any] = {}
_classes: dict[str, Any] = {}  # by name


def class_on_kernels(
    layer: nn.Module, held: Held, replaced: Mapping[Core, Function], reduce: Function
) -> Any:
    """The subclass of a layer in which cores are replaced."""
    kind: Any = type(layer)
    key = (kind, held, frozenset(replaced.items()))
    if key not in _latest or _has_changed(_latest[key]):
        name = uuid.uuid4().hex
        namespace = {
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": reduce,
            "patched_from": kind,
            "patched_by": None,
            "cores_of": name,
            **_methods_on_kernels(layer, held, replaced),
        }
        _latest[key] = _classes[name] = functions.subclass(kind, namespace)
    return _latest[key]


def _has_changed(made: Any) -> bool:
    """Whether a class runs its own code because something has changed since it was made."""
    return any(each.changed() is not None for each in vars(made).values() if hasattr(each, "changed"))


def remade(kind: Any, name: str, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A copy of a layer with replaced cores; in another process, the layer as it was."""
    layer = make(*arguments)
    made: Any = _classes.get(name)
    if type(layer) is kind and getattr(made, "patched_from", None) is kind:
        layer.__class__ = made
    return layer
