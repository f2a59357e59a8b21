# SPDX-License-Identifier: Apache-2.0
"""Whether a function may give other results for the same arguments, or leave traces, according to its bytecode."""

from __future__ import annotations

import builtins
import enum
import functools
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CodeType,
    EllipsisType,
    FunctionType,
    GenericAlias,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    NoneType,
    NotImplementedType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Any

from vitkern.compat.trial.flow import Step, flow_of, words
from vitkern.compat.trial.stack import ATTRIBUTES, Item, operands_of

MODULES = words(
    "builtins torch vitkern math numpy typing warnings logging functools operator einops collections enum itertools "
    "numbers"
)
BUILTINS = words(
    "abs all any bool bytes complex dict divmod enumerate filter float format frozenset int "
    "len list map max min object pow print range repr reversed round set slice sorted str sum "
    "super tuple type zip NotImplemented Ellipsis property staticmethod classmethod"
)
# Code writes by these without an instruction that writes.
WRITERS = words("__setattr__ __delattr__ __setitem__ __delitem__ __dict__ __globals__ __closure__")
GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
FIXED = (
    *(str, bytes, int, float, complex, NoneType, EllipsisType, NotImplementedType),
    *(ModuleType, type, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType),
    *(GenericAlias, UnionType, re.Pattern, logging.Logger, enum.Enum),
)
MADE_OF_PARTS = (
    tuple,
    frozenset,
    functools.partial,
    staticmethod,
    classmethod,
    MethodType,
    BuiltinFunctionType,
)
TORCH_VALUES = frozenset({"dtype", "device", "layout", "memory_format"})
FREE_STORES = {"STORE_DEREF": "writes", "DELETE_DEREF": "deletes"}
GLOBAL_STORES = {"STORE_GLOBAL": "writes", "DELETE_GLOBAL": "deletes"}
# The position of the object that is written to, among the values that the instruction takes.
TARGETS = {"STORE_ATTR": 1, "DELETE_ATTR": 0, "STORE_SUBSCR": 1, "STORE_SLICE": 1, "DELETE_SUBSCR": 0}


def impurity(
    code: CodeType,
    namespace: Mapping[str, Any],
    closure: Mapping[str, Any] | None = None,
    defaults: tuple[Any, ...] = (),
    read: frozenset[int] = frozenset(),
) -> str | None:
    """The reason why a function is not pure, in a sentence, or None.

    Args:
        code: of the function. Nested functions count as well.
        namespace: its globals.
        closure: its free variables that have a value.
        defaults: of its parameters, keyword-only ones as well.
        read: the ids of functions of other projects that are read themselves.
    """
    if code.co_flags & GENERATOR:
        return "is a generator"
    reader = _Reader(namespace, closure or {}, frozenset(code.co_freevars), read)
    for value in defaults:
        if not is_fixed(value):
            return f"has a default, {_may_change(value)}: line {code.co_firstlineno}"
        if reason := reader.from_elsewhere(value):
            return f"{reason}: line {code.co_firstlineno}"
    return next((f"{reason}: line {line}" for line, reason in reader.reasons(code)), None)


def names_of(code: CodeType) -> tuple[str, ...]:
    """The globals that a function and its nested functions read."""
    found = {step.value: None for step in flow_of(code).steps if step.op == "LOAD_GLOBAL"}
    for inner in _nested(code):
        found |= dict.fromkeys(names_of(inner))
    return tuple(found)


def static_functions(kind: type) -> list[FunctionType]:
    """The functions of a class that need no instance: those of an autograd function."""
    held: list[Any] = [each.__func__ for each in vars(kind).values() if isinstance(each, staticmethod)]
    return [each for each in held if isinstance(each, FunctionType)]


def is_fixed(value: object) -> bool:
    """Whether a value is the same at each call, unless its name is bound to another one."""
    kind = type(value)
    if isinstance(value, FIXED):
        return True
    if isinstance(value, MADE_OF_PARTS):
        return all(map(is_fixed, _parts(value)))
    if kind.__module__ == "torch":
        return kind.__name__ in TORCH_VALUES
    # Generics, operators of torch, and functions of numpy are objects of classes of their own.
    return kind.__module__ in ("typing", "torch._ops") or (
        _top(kind.__module__) == "numpy" and callable(value)
    )


def _parts(value: object) -> tuple[object, ...]:
    if isinstance(value, tuple | frozenset):
        return tuple(value)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    return (value.__self__,) if isinstance(value, BuiltinFunctionType) else ()


class _Reader:
    def __init__(
        self,
        namespace: Mapping[str, Any],
        closure: Mapping[str, Any],
        free: frozenset[str],
        read: frozenset[int],
    ) -> None:
        self.namespace, self.closure, self.free, self._read_too = namespace, closure, free, read
        self.modules = MODULES | {_top(str(namespace.get("__name__", "")))}

    def reasons(self, code: CodeType) -> Iterator[tuple[int, str]]:
        steps, operands = flow_of(code).steps, operands_of(code)
        for index, step in enumerate(steps):
            reason = self._written(code, step, operands[index]) or self._read(steps, index)
            if reason is not None:
                yield step.line or code.co_firstlineno, reason
        for inner in _nested(code):
            yield from self.reasons(inner)

    def _written(self, code: CodeType, step: Step, taken: tuple[Item, ...]) -> str | None:
        if step.op in GLOBAL_STORES:
            return f"{GLOBAL_STORES[step.op]} the global '{step.value}'"
        if step.op in FREE_STORES and step.value in self.free and step.value in code.co_freevars:
            return f"{FREE_STORES[step.op]} the closure variable '{step.value}'"
        if step.op not in TARGETS:
            return None
        target = taken[TARGETS[step.op]]
        kind, name = target.root or ("other", "")
        attribute = step.value if step.op.endswith("_ATTR") else None
        if kind == "self":
            return f"writes its attribute '{_attribute(target, attribute)}'"
        if kind == "global" or (kind == "free" and name in self.free):
            return f"writes into the {_noun(kind)} '{target.chain or name}'"
        context = code.co_varnames[: code.co_argcount][:1] == ("ctx",) and target.chain == "ctx"
        if attribute is not None and not (context and kind == "local"):
            return f"writes the attribute '{attribute}' of '{target.chain or name or 'a value'}'"
        return None

    def _read(self, steps: tuple[Step, ...], index: int) -> str | None:
        step = steps[index]
        if step.op == "LOAD_GLOBAL":
            if step.value in self.namespace:
                return self._chain("global", self.namespace[step.value], steps, index)
            return _builtin(step.value)
        if step.op in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
            if step.value in self.free and step.value in self.closure:
                return self._chain("free", self.closure[step.value], steps, index)
        elif step.op in ATTRIBUTES:
            return f"uses {step.value}" if step.value in WRITERS else None
        elif step.op == "IMPORT_NAME":
            return self._imported(steps, index)
        return None

    def _chain(self, kind: str, value: Any, steps: tuple[Step, ...], index: int) -> str | None:
        """The reason why a name, or the plain attributes that follow it, are not pure, or None."""
        path = [steps[index].value]
        while True:
            if reason := self.from_elsewhere(value):
                return reason
            if isinstance(value, ModuleType) and _top(value.__name__) == "torch":
                return None
            if not is_fixed(value):
                return f"reads the {_noun(kind)} '{'.'.join(path)}', {_may_change(value)}"
            index += 1
            if index == len(steps) or steps[index].op not in ATTRIBUTES:
                return None
            path.append(steps[index].value)
            found = _attribute_of(value, path[-1])
            if found is None:
                return None
            (value,) = found

    def from_elsewhere(self, value: object) -> str | None:
        """Why a module, function or class is refused: it is neither the project's nor known to be pure. Else None."""
        parts = static_functions(value) if isinstance(value, type) else [value]
        if parts and all(id(each) in self._read_too for each in parts):
            return None
        if isinstance(value, ModuleType):
            return self._module(value.__name__)
        if isinstance(value, BuiltinFunctionType) and value.__module__ == "builtins":
            return _builtin(value.__name__)
        if isinstance(value, FunctionType | BuiltinFunctionType | type) and value.__module__:
            return self._module(value.__module__)
        return next(filter(None, map(self.from_elsewhere, _parts(value))), None)

    def _module(self, name: str) -> str | None:
        # Functions in C often name a module with an underscore, such as _operator.
        if not {_top(name), _top(name).lstrip("_")} & self.modules or name.startswith("numpy.random"):
            return f"uses the module '{name}'"
        return None

    def _imported(self, steps: tuple[Step, ...], index: int) -> str | None:
        """Why an import inside the function is not pure, or None. The steps before it load its level and names."""
        name, level = steps[index].value, steps[index - 2].value
        if level:
            package = str(self.namespace.get("__package__") or self.namespace.get("__name__", ""))
            name = ".".join(filter(None, [package.rsplit(".", level - 1)[0], name]))
        if reason := self._module(name):
            return reason
        module = sys.modules.get(name)
        for step in steps[index + 1 :]:
            if step.op == "IMPORT_FROM" and module is not None and _top(name) != "torch":
                value = vars(module).get(step.value)
                if not is_fixed(value):
                    return f"reads '{name}.{step.value}', {_may_change(value)}"
                if reason := self.from_elsewhere(value):
                    return reason
            elif step.op not in ("IMPORT_FROM", "STORE_FAST", "STORE_DEREF"):
                break
        return None


def _nested(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType)]


def _builtin(name: str) -> str | None:
    value = getattr(builtins, name, None)
    if value is None or name in BUILTINS or (isinstance(value, type) and issubclass(value, BaseException)):
        return None
    return f"calls {name}"


def _attribute_of(owner: object, name: str) -> tuple[Any] | None:
    """An attribute of a module, a class or a function, if it has one. No code of the owner runs for it."""
    spaces = owner.__mro__ if isinstance(owner, type) else (owner,)
    if not isinstance(owner, type | ModuleType | FunctionType):
        return None
    return next(((vars(space)[name],) for space in spaces if name in vars(space)), None)


def _attribute(target: Item, attribute: str | None) -> str:
    path = (target.chain or "").split(".")
    if len(path) > 1:
        return path[1]
    return attribute or next((name for kind, name in sorted(target.reads) if kind == "attribute"), "self")


def _noun(kind: str) -> str:
    return "global" if kind == "global" else "closure variable"


def _may_change(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name} that may change"


def _top(module: str) -> str:
    return module.partition(".")[0]
