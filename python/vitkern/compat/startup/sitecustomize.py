# SPDX-License-Identifier: Apache-2.0
"""Python runs this module at startup in the processes of `vitkern run` and in their children: see compat/run.py."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec


class _Wait(MetaPathFinder):
    """Imports vitkern when a package is imported that it changes: vitkern imports torch, which few processes need."""

    def __init__(self) -> None:
        self.packages = {
            "MultiScaleDeformableAttention",
            "detrex",
            "groundingdino",
            "mmcv",
            "nvidia_tao_pytorch",
        }

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self.packages:
            return None
        self.packages.remove(name)
        from vitkern.compat.run import find_switched

        return find_switched(name, override="override" in options)


options = os.environ.get("VITKERN_RUN", "").split(",")
if "install" in options:
    sys.meta_path.insert(0, _Wait())

# This folder leaves the path, and another module of this name runs, as if the folder had never been on the path.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(__file__)]
_other = PathFinder.find_spec("sitecustomize")
if _other is not None and _other.loader is not None:
    _other.loader.exec_module(module_from_spec(_other))
