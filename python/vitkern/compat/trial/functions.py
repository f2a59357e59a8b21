# SPDX-License-Identifier: Apache-2.0
"""The functions of the user's project that a layer's forward may call, and the properties that their code shows."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from vitkern.compat.trial.flow import instructions
from vitkern.compat.trial.purity import impurity, names_of, static_functions
from vitkern.compat.trial.registries import LIBREYOLO

FORWARD, BACKWARD = "ms_deform_attn_forward", "ms_deform_attn_backward"  # of the op's compiled module
EXTENSIONS = frozenset({"MSDA", "_C", "_ext", "ext_module"})  # names of that module in projects

_FOREIGN = frozenset({"torch", "numpy", "einops", "vitkern", "typing_extensions", "_distutils_hack"})

# Decorators and checks of known libraries: they rename arguments, warn and check, and return their arguments.
# LibreYOLO's registry: see registries.py.
_HARMLESS = frozenset(
    {
        LIBREYOLO,
        "mmcv.utils.misc",
        "mmengine.utils.misc",
        "transformers.utils.deprecation",
        "transformers.utils.import_utils",
    }
)

_EMPTY = nn.Module()  # for the attributes that every module has

_MAKE_STRINGS = frozenset({"type", "str", "repr", "format", "__str__", "__repr__", "__name__", "join"})
_MAKE_TABLES = frozenset({"BUILD_MAP", "BUILD_CONST_KEY_MAP", "MAP_ADD"})


def belongs(module: object) -> bool:
    """Whether a module of this name is the user's: its functions have to be proved, line by line."""
    return isinstance(module, str) and module not in _HARMLESS and not _is_foreign(module.partition(".")[0])


@functools.lru_cache(maxsize=1024)
def _is_foreign(package: str) -> bool:
    """Whether a package is Python's, torch's or another whose functions do as documented."""
    if package in sys.stdlib_module_names:  # a project may have taken such a name
        file = getattr(sys.modules.get(package), "__file__", None)
        return file is None or file.startswith(sysconfig.get_path("stdlib"))
    return package in _FOREIGN


def frame_belongs(frame: FrameType) -> bool:
    return belongs(frame.f_globals.get("__name__")) and not _imports(frame)


def _imports(frame: FrameType | None) -> bool:
    """Whether an import runs the frame: torch imports parts of itself in first calls, and all import hooks run."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def undone(value: Any) -> Any:
    """A function, or the one that it replaces, if this package has replaced one; a class likewise."""
    return vars(value).get("replaces", value) if isinstance(value, (FunctionType, type)) else value


def is_harmless(function: FunctionType) -> bool:
    """Whether a decorator or check is one of those of known libraries."""
    return function.__globals__.get("__name__") in _HARMLESS


def is_theirs(function: Any) -> bool:
    return isinstance(function, FunctionType) and belongs(function.__globals__.get("__name__"))


def is_applied(value: Any) -> bool:
    """Whether a value is an autograd function of the user's project."""
    return (
        isinstance(value, type) and issubclass(value, torch.autograd.Function) and belongs(value.__module__)
    )


def is_extension(name: str, value: Any) -> bool:
    """Whether a global is the compiled module of the op, or its substitute after a failed import."""
    known = name in EXTENSIONS and (value is None or isinstance(value, ModuleType))
    return known or (not isinstance(value, type) and _has(value, FORWARD))


def _has(value: Any, name: str) -> bool:
    """Whether a value has an attribute; an object of the user's project is not asked, as that may run its code."""
    if belongs(type(value).__module__):
        return inspect.getattr_static(value, name, None) is not None
    return hasattr(value, name)


def content(cell: CellType) -> Any:
    """A variable of a closure, None if it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def methods_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class and of its bases below torch's, the nearest first."""
    seen: set[str] = set()
    for base in kind.__mro__:
        for name, value in vars(base).items() if belongs(base.__module__) else ():
            if name not in seen:
                seen.add(name)
                if isinstance(value, FunctionType):
                    yield name, value


def is_core(module: nn.Module) -> bool:
    """Whether a child is only code, as the sampling of most layers of transformers is."""
    if type(module).__module__.partition(".")[0] == "torch" or "forward" in vars(module):
        return False
    if module._parameters or module._buffers or module._modules:
        return False
    own = vars(module).keys() - vars(_EMPTY).keys()
    return not any(own & names_in(each.__code__) for _, each in methods_of(type(module)))


def reachable(layer: nn.Module, kind: type[nn.Module]) -> Iterator[FunctionType]:
    """The functions that a layer's forward may call, according to names; the forward itself comes first."""
    methods = dict(methods_of(kind))
    waiting: list[Any] = [each for each in vars(layer).values() if callable(each)]
    waiting += [type(child).forward for child in layer.children() if is_core(child)]
    waiting.append(kind.forward)
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        value = undone(getattr(value, "func", value))  # of a partial
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type) and belongs(value.__module__) and not issubclass(value, nn.Module):
            waiting += static_functions(value)
        if not isinstance(value, FunctionType):
            continue
        waiting += map(content, value.__closure__ or ())
        if is_theirs(value):
            yield value
            scope = value.__globals__
            waiting += [scope[name] for name in names_of(value.__code__) if name in scope]
            waiting += [methods[name] for name in names_in(value.__code__) if name in methods]


def code_of(function: Any) -> CodeType | None:
    """The code of a function, without its decorators."""
    return getattr(inspect.unwrap(function), "__code__", None)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code object and those nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def names_in(code: CodeType) -> set[str]:
    """All names of globals and attributes that a function mentions."""
    return set().union(*(each.co_names for each in codes_in(code)))


def impurity_of(function: FunctionType, read: frozenset[int] = frozenset()) -> str | None:
    """Why a function is not pure, or None. The op's compiled module counts as pure: a trial has its published form.

    `read`: the ids of functions that are checked as well, of whatever project they are.
    """
    closure = dict(zip(function.__code__.co_freevars, map(content, function.__closure__ or ())))
    scope = {name: each for name, each in function.__globals__.items() if not is_extension(name, each)}
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return impurity(function.__code__, scope, closure, defaults, read)


def largest_constant(functions: Iterable[FunctionType]) -> int:
    """The largest number up to 4096 that the code names: the sizes of a trial have to exceed it."""
    numbers = [each for function in functions for each in _numbers(function)]
    return max((each for each in numbers if each <= 4096), default=0)


def out_of_reach(function: FunctionType) -> int | None:
    """A number that the code names and that may be a size beyond those of a trial."""
    return next((each for each in _numbers(function) if 4096 < each < 1e8), None)


def _numbers(function: FunctionType) -> list[int]:
    """The positive numbers that the code names: constants, defaults and globals."""
    found: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found += (function.__globals__.get(name) for name in names_of(function.__code__))
    for code in codes_in(function.__code__):
        found += code.co_consts
    return [int(each) for each in found if isinstance(each, (int, float)) and 0 < each < 1e8]


def makes_strings(code: CodeType) -> bool:
    """Whether code may make a string of a tensor's device or dtype."""
    return bool(_MAKE_STRINGS & names_in(code))


def makes_tables(code: CodeType) -> bool:
    """Whether code makes a dictionary, all of whose keys a trial would have to look up."""
    return any(each.opname in _MAKE_TABLES and each.arg for each in instructions(code))


def is_argument(code: CodeType, name: str) -> bool:
    """Whether a local is an argument that the code never assigns."""
    stored = {each.argval for each in instructions(code) if each.opname.startswith(("STORE_", "DELETE_"))}
    return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] and name not in stored


_COMPARISONS = frozenset({"COMPARE_OP", "CONTAINS_OP", "IS_OP"})
_CHECKS = frozenset({"torch_compilable_check", "_check", "_check_with", "_assert"})
_PADDING = frozenset(
    {"CACHE", "COPY", "TO_BOOL", "UNARY_NOT", "NOP", "EXTENDED_ARG", "DUP_TOP", "ROT_THREE", "SWAP"}
)


def free_comparisons(code: CodeType) -> Iterator[tuple[CodeType, int, int]]:
    """Comparisons whose result is a number to compute with, rather than a condition or a check.

    Each with its code object, the offset of the instruction and the line.
    """
    for each in codes_in(code):
        steps = [step for step in instructions(each) if step.opname not in _PADDING]
        checks = sum(step.argval in _CHECKS for step in steps if step.opname.startswith("LOAD_"))
        line = each.co_firstlineno
        for step, following in itertools.pairwise(steps):
            line = (
                getattr(step, "line_number", None)
                or (step.starts_line if step.starts_line is not True else 0)
                or line
            )
            decides = "JUMP" in following.opname or (
                following.opname == "STORE_FAST" and _only_decides(steps, following.argval)
            )
            if step.opname in _COMPARISONS and not decides:
                checks -= 1
                if checks < 0:
                    yield each, step.offset, line


def _only_decides(steps: list[Any], local: str) -> bool:
    """Whether a local is used in conditions only."""
    uses = [
        "JUMP" in following.opname
        for step, following in itertools.pairwise(steps)
        if step.argval == local and not step.opname.startswith("STORE_")
    ]
    return bool(uses) and all(uses)


def subclass(kind: Any, namespace: dict[str, Any]) -> Any:
    """A subclass that the user's registries do not see: its bases are set after it was made."""
    made = type.__new__(
        type(kind), kind.__name__, (nn.Module,), {"__qualname__": kind.__qualname__, **namespace}
    )
    made.__bases__ = (kind,)
    return made


def parts_of(function: FunctionType) -> Iterator[str]:
    """The names that a function's code reads from modules of the user's project, one step deep."""
    for name in names_of(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and (
            belongs(value.__name__) or value.__name__.startswith("vitkern")
        ):
            yield from vars(value).keys() & names_in(function.__code__)


def free_variable(function: FunctionType) -> str | None:
    """A variable of an enclosing function that the code reads and that is neither a function nor a class."""
    variables = zip(function.__code__.co_freevars, map(content, function.__closure__ or ()))
    return next((name for name, value in variables if not isinstance(value, (FunctionType, type))), None)


def cast_under_autocast(function: Any) -> torch.dtype | None:
    """The 16-bit type to which an autograd function's decorator casts its inputs under autocast, or None."""
    while isinstance(function, FunctionType):
        for value in map(content, function.__closure__ or ()):
            if isinstance(value, torch.dtype) and value in (torch.float16, torch.bfloat16):
                return value
        function = getattr(function, "__wrapped__", None)
    return None


def foreign_autocast(function: Any) -> str | None:
    """The device of an autocast that decorates a function and that does nothing on a CPU."""
    while isinstance(function, FunctionType):
        for value in map(content, function.__closure__ or ()):
            if isinstance(value, torch.autocast) and value.device != "cpu":
                return value.device
        function = getattr(function, "__wrapped__", None)
    return None
