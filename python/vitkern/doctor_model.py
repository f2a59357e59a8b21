# SPDX-License-Identifier: Apache-2.0
"""`vitkern doctor --model`: which layers of a model ``vitkern.patch`` replaces, and which it leaves and why."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vitkern.compat.patching import patch

FORMS = (
    "a model is named as package.module:name or file.py:name, where name is a model or makes one without arguments, or "
    "as a folder or file with a config of transformers"
)


def load(name: str) -> nn.Module:
    """The model of that name, see FORMS. From a config it has shapes and no weights. Nothing is downloaded."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return _of_config(path)
    source, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(f"vitkern doctor: {FORMS}; got {name!r}")
    module = _of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    if not hasattr(module, attribute):
        raise ValueError(f"vitkern doctor: {source} has no {attribute!r}")
    model = getattr(module, attribute)
    if not isinstance(model, nn.Module):
        model = model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"vitkern doctor: {name} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"vitkern doctor: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as python runs a script
    spec.loader.exec_module(module)
    return module


def _of_config(path: Path) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return model


def main(name: str, *, as_json: bool = False) -> int:
    """Print the table; 1 where the model cannot be had or has no layer to replace."""
    try:
        table = patch(load(name))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = [{**row._asdict(), "fused": row.fused} for row in table]
    left = [each._asdict() for each in table.left]
    print(json.dumps({"replaced": rows, "left": left}, indent=2) if as_json else table)
    return 0 if table else 1
