# SPDX-License-Identifier: Apache-2.0
"""`vitkern doctor --model`: the layers of a model that ``vitkern.patch`` replaces, and why others stay."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitkern.commands import named
from vitkern.commands.errors import CommandError
from vitkern.compat.patching import patch
from vitkern.compat.table import Table

FORMS = (
    "package.module:name or file.py:name, where name is a model or makes one without arguments, "
    "or a folder or file with a config of transformers"
)


def model_of(name: str) -> nn.Module:
    """The model of that name, see FORMS. From a config it has shapes and no weights. Nothing is downloaded."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return _of_config(path)
    model = named.load(name, option="--model", forms=FORMS)
    if not isinstance(model, nn.Module):
        model = model()
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _of_config(path: Path) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return model


def summary(table: Table) -> str:
    """The trial's results as counts: fused layers, functions that sample, and layers that stay."""
    fused = sum(len(row.paths) for row in table if row.fused)
    cores = sum(len(row.paths) for row in table if not row.fused)
    counts = [(fused, "fused"), (cores, "where it samples"), (len(table.left), "left")]
    return "by trial: " + ", ".join(f"{count} {name}" for count, name in counts)


def main(name: str, *, as_json: bool = False) -> int:
    """Prints the table; returns 1 if the model has no layer to replace."""
    try:
        table = patch(model_of(name))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"--model {name}: {error}") from error
    rows = [{**row._asdict(), "fused": row.fused} for row in table]
    left = [each._asdict() for each in table.left]
    found = {"replaced": rows, "left": left, "taken": list(table.taken)}
    print(json.dumps(found, indent=2) if as_json else f"{table}\n{summary(table)}")
    return 0 if table else 1
