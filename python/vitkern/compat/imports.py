# SPDX-License-Identifier: Apache-2.0
"""Import hooks: modules that this package supplies, and changes to other packages' modules after their import."""

from __future__ import annotations

import _imp
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

Act = Callable[[ModuleType], None]


class Supply(NamedTuple):
    """The function that fills a supplied module, and whether it precedes an installed one, and is a package."""

    fill: Act
    first: bool
    is_package: bool


class _Supplier(Loader):
    """A loader that creates and fills a supplied module."""

    def __init__(self, fill: Act) -> None:
        self._fill = fill

    def exec_module(self, module: ModuleType) -> None:
        self._fill(module)


class _Follower(Loader):
    """Wraps the loader of a followed module. The module's own attributes show the wrapped loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if module.__name__ in _finder.followed:  # and not withdrawn since it was found
            _finder.followed[module.__name__](module)

    def __getattr__(self, name: str) -> Any:  # runpy and pkgutil request the code from a loader
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    """A finder before all others, so it sees every import. Installed modules still come before the supplied ones."""

    def __init__(self) -> None:
        self.supplied: dict[str, Supply] = {}
        self.followed: dict[str, Act] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if package is not None and is_ours(package):
            path = _give_way(package) or path
            if is_ours(package) and name not in self.supplied:
                why = f"{package.__name__} is not installed, vitkern supplies only one module of it"
                raise ModuleNotFoundError(f"No module named {name!r}: {why}", name=name)
        elif name not in self.supplied and name not in self.followed:
            return None
        theirs = _ask_others(name, path, target)
        if name in self.supplied:
            ours = self.supplied[name]
            if ours.first or theirs is None:
                return ModuleSpec(name, _Supplier(ours.fill), origin=__name__, is_package=ours.is_package)
        if theirs is not None and theirs.loader is not None and name in self.followed:
            theirs.loader = _Follower(theirs.loader)
        return theirs


_finder = _Finder()


def _give_way(package: ModuleType) -> Sequence[str] | None:
    """Turns a stand-in package into the real one, if that is installed by now. Returns the folders of its modules."""
    theirs = _ask_others(package.__name__, None)
    if theirs is None or theirs.submodule_search_locations is None:
        return None
    package.__spec__, package.__loader__, package.__file__ = theirs, theirs.loader, theirs.origin
    package.__path__ = theirs.submodule_search_locations
    if theirs.loader is not None:
        try:
            with _import_lock_released():
                theirs.loader.exec_module(package)
        except BaseException:
            del sys.modules[package.__name__]  # as with any package whose import fails
            raise
    return package.__path__


@contextlib.contextmanager
def _import_lock_released() -> Iterator[None]:
    """Lets other threads import inside a ``with`` block: Python holds its import lock while it asks a finder."""
    depth = 0
    with contextlib.suppress(RuntimeError):  # this thread does not hold it any more
        while True:
            _imp.release_lock()
            depth += 1
    try:
        yield
    finally:
        for _ in range(depth):
            _imp.acquire_lock()


def find_spec(name: str) -> ModuleSpec | None:
    """The spec by which a module outside of packages is imported, including the changes of this file."""
    return _finder.find_spec(name, None)


def _ask_others(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is not _finder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def find_elsewhere(name: str) -> ModuleSpec | None:
    """The spec of a module without this file, or None. Its packages are found but not imported."""
    spec, path, parts = None, None, name.split(".")
    for end in range(1, len(parts) + 1):
        spec = _ask_others(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and end < len(parts):
            return None
    return spec


def is_ours(module: ModuleType | None) -> bool:
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Supplier)


def comes_first(name: str) -> bool:
    return name in _finder.supplied and _finder.supplied[name].first


def supply(name: str, fill: Act, *, first: bool = False, is_package: bool = False) -> None:
    """Supplies a module of this name, filled by `fill`, to imports. An installed module comes first unless `first`."""
    _finder.supplied[name] = Supply(fill, first, is_package)
    _listen()


def follow(name: str, act: Act) -> None:
    """Calls `act` on this module: now if it is imported, and after any later import or reload of it."""
    _finder.followed[name] = act
    _listen()
    if name in sys.modules:
        act(sys.modules[name])


def is_followed(name: str) -> bool:
    return name in _finder.followed


def withdraw(name: str) -> bool:
    """Undoes `supply` and `follow` for a name; code that holds the module keeps it.

    Returns whether there was anything to undo.
    """
    known = [table.pop(name, None) for table in (_finder.supplied, _finder.followed)]
    if not (_finder.supplied or _finder.followed) and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    module = sys.modules.get(name)
    if not is_ours(module):
        return any(known)
    del sys.modules[name]
    parent, _, attribute = name.rpartition(".")
    if vars(sys.modules.get(parent, object)).get(attribute) is module:
        delattr(sys.modules[parent], attribute)
    return True


def _listen() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
