# SPDX-License-Identifier: Apache-2.0
"""Imports single files of a project, without running its packages' ``__init__`` and without most of its requirements.

A package of the project is an empty module that imports a name from where its ``__init__`` would. A package that is
not installed is a stand-in: its decorators return the decorated function, and its classes are ``torch.nn.Module``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vitkern.compat.trial import world

_COMPILED = ("_C", "_ext")
_KERNELS = ("ms_deform_attn_forward", "ms_deform_attn_backward")  # only a compiled module has these


def compiled(name: str) -> types.ModuleType:
    """A stand-in for a compiled module: the published op in plain torch."""
    module = types.ModuleType(name)
    module.ms_deform_attn_forward = world._published_forward  # type: ignore[attr-defined]
    module.ms_deform_attn_backward = world._published_backward  # type: ignore[attr-defined]
    return module


class Anything:
    """A stand-in for any name of a package that is not installed."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _KERNELS:
            raise AttributeError(name)
        return Anything(name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if self.__name__ == "load_ext":
            return compiled("_ext")
        decorated = given[0] if len(given) == 1 and not named else None
        return decorated if isinstance(decorated, (type, types.FunctionType)) else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        others = [each for each in bases if isinstance(each, type) and issubclass(each, nn.Module)]
        return () if others else (nn.Module,)

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __getitem__ = __or__

    def __iter__(self) -> Any:
        return iter(())


class Missing(types.ModuleType):
    """A stand-in for a module that is not installed."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _KERNELS:
            raise AttributeError(name)
        if name.startswith("IS_") and name.endswith("_AVAILABLE"):
            return False
        if name in _COMPILED:
            return compiled(name)
        return _CLASSES.get(name) or Anything(name)


class _BaseModule(nn.Module):
    """A stand-in for the BaseModule of mmcv and mmengine."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()


_CLASSES: dict[str, Any] = {"BaseModule": _BaseModule}


class Package(types.ModuleType):
    """A package of the project: its ``__init__`` is read, not run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _imported_names(Path(self.__path__[0]) / "__init__.py").get(name)
        if found is not None:
            module, original = found
            return getattr(importlib.import_module(module, self.__name__), original)
        try:
            return importlib.import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError:
            return compiled(name) if name in _COMPILED else Anything(name)


def _imported_names(file: Path) -> dict[str, tuple[str, str]]:
    """The names that a file imports from modules of its own package, with the module and the name there."""
    names: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ():
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                names[each.asname or each.name] = ("." * node.level + (node.module or ""), each.name)
    return names


class _Lenient(SourceFileLoader):
    """Keeps a module whose import fails half-way, for modules that need only its beginning."""

    failed: ClassVar[dict[str, BaseException]] = {}

    def exec_module(self, module: types.ModuleType) -> None:
        try:
            super().exec_module(module)
        except Exception as error:
            self.failed[module.__name__] = error
            vars(module)["__getattr__"] = Anything


class _Packages:
    """Finds packages and modules below the roots, before all other finders."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots, self.own = roots, {each.name for root in roots for each in root.iterdir()}
        self.missing: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        for root in self.roots:
            place = root.joinpath(*name.split("."))
            if place.is_dir():
                spec = ModuleSpec(name, self, is_package=True)
                spec.submodule_search_locations = [str(place)]
                return spec
            file = place.with_suffix(".py")
            if file.is_file():
                return importlib.util.spec_from_file_location(name, file, loader=_Lenient(name, str(file)))
        return None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Package(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Runs nothing."""


class _Absent:
    """Finds stand-ins for packages that are not installed, for the files of the project only."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(map(str, roots))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        frame = sys._getframe(1)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        of_project = frame.f_code.co_filename.startswith(self._roots)
        return ModuleSpec(name, self, is_package=True) if of_project else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Missing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Runs nothing."""


def load(roots: Sequence[Path], module: str, absent: Sequence[str] = ()) -> types.ModuleType:
    """Imports a module of the project, permanently for this process. `absent`: packages to treat as not installed."""
    sys.meta_path.insert(0, _Packages(roots))  # type: ignore[arg-type]
    sys.meta_path.append(_Absent(roots))  # type: ignore[arg-type]
    for name in absent:
        sys.modules[name] = Missing(name)
    sys.modules["MultiScaleDeformableAttention"] = compiled("MultiScaleDeformableAttention")
    torch.ops.load_library = lambda path: None  # of projects whose compiled library is not there
    return importlib.import_module(module)
