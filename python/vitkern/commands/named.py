# SPDX-License-Identifier: Apache-2.0
"""An object that a user names on the command line, in a module or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from vitkern.commands.errors import CommandError, in_one_line


def load(name: str, *, option: str, forms: str) -> Any:
    """The object at package.module:name or file.py:name. Errors say that `option` takes `forms`."""
    source, _, attribute = name.rpartition(":")
    if not (source and attribute):
        raise CommandError(f"{option} takes {forms}; got {name!r}")
    try:
        module = _of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # user code runs: anything can happen
        why = f"{type(error).__name__}: {in_one_line(error)}"
        raise CommandError(f"{option} {name}: {source} cannot be imported: {why}") from error
    if not hasattr(module, attribute):
        raise CommandError(f"{option} {name}: {source} has no {attribute!r}")
    return getattr(module, attribute)


def _of_file(path: Path) -> ModuleType:
    """The module of a file, imported as python runs a script: its folder is on the path, so it finds its neighbours."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[spec.name] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    return module
