# SPDX-License-Identifier: Apache-2.0
"""``vitkern.patch("package.module")``: the cores of an imported module, replaced for the whole process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from vitkern.compat.cores import core_of, replacement_of
from vitkern.compat.table import Left, Table
from vitkern.compat.trial import functions

_originals: dict[str, list[Any]] = {}  # cores that were replaced, by the name that `patch` was given


class Functions:
    """The cores of an imported module of a project, replaced for the whole process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _places(self) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
        """Each name for a core of this module in a module of the same project."""
        present = [each for each in vars(sys.modules[self._name]).values() if core_of(each)]
        # After a reload the module has others, and modules that imported from it still have those replaced before.
        own = {id(functions.undone(each)) for each in (*present, *_originals.get(self._name, ()))}
        project = self._name.partition(".")[0]
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] == project and isinstance(module, ModuleType):
                for key, value in list(vars(module).items()):
                    if id(functions.undone(value)) in own:
                        yield f"{name}.{key}", vars(module), key, value

    def patch(self, *, dry_run: bool = False) -> Table:
        rows, left = [], []
        for path, scope, key, value in self._places():
            core = None if hasattr(value, "samples") else core_of(value)
            if core is None:
                continue
            _, proof, function = replacement_of(core)
            if proof.reason is not None:
                left.append(Left(path, key, proof.reason))
                continue
            rows.append((path, f"{key}, for the whole process", "ms_deform_attn"))
            if not dry_run:
                scope[key] = function
                _originals.setdefault(self._name, []).append(value)
        if not rows and not left and not any(hasattr(value, "samples") for _, _, _, value in self._places()):
            warnings.warn(f"vitkern.patch found no function that samples in {self._name}", stacklevel=3)
        return Table(rows, left)

    def unpatch(self) -> Table:
        rows = []
        for path, scope, key, value in self._places():
            if hasattr(value, "samples"):
                scope[key] = value.replaces
                rows.append((path, f"{key} on ms_deform_attn", key))
        _originals.pop(self._name, None)
        return Table(rows)
