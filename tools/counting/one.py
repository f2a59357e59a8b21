# SPDX-License-Identifier: Apache-2.0
"""One class of the census, in its own process: the trials of it and of its stand-in, differences and times."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitkern
from tests import layers_of_others, layers_today
from tools.counting import calls, loading, sources
from tools.counting.records import MMCV, RECORDS, Record

ABSENT = ("mmcv.utils", "mmcv.cnn", "mmcv.runner", "mmengine")
REPEATS = 3


def verdict(number: int, below: Path) -> dict[str, Any]:
    """The row of one record. It changes the process that it runs in: modules are imported and replaced."""
    torch.set_num_threads(1)
    record = RECORDS[number]
    uses_mmcv = record.module.startswith(("projects.mmdet3d", "mmcv"))
    roots = [sources.folder_of(each, below) for each in (record.source, *[MMCV] * uses_mmcv)]
    module = loading.load(roots, record.module, ABSENT if uses_mmcv else ())
    kind = getattr(module, record.kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = {**_identity(record), "hash": text_hash(kind), **_measured(record, kind)}
        row["stand_in_by"] = _stand_in(record)
    return row


def _identity(record: Record) -> dict[str, Any]:
    names = ("project", "source", "module", "kind", "stand_in")
    return {name: getattr(record, name) for name in names}


def text_hash(kind: type) -> str:
    """A hash of the class's code without comments, docstrings and layout."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def _measured(record: Record, kind: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = kind(**record.arguments)
    layer = _spread(layer)
    table = vitkern.patch(patched := copy.deepcopy(layer))
    row: dict[str, Any] = {"by": _by(table), "unless": record.unless}
    row["reason"] = "; ".join(sorted({each.reason for each in table.left}))
    if row["by"] == "left" or not record.call:
        return row
    torch.manual_seed(1)
    positional, named = calls.CALLS[record.call](layer)
    try:
        before = _results(layer, positional, named)
    except Exception as error:
        return {**row, "unless": f"its own forward raises: {error}"}
    after = _results(patched, positional, named)
    outputs, gradients = (_distance(a, b) for a, b in zip(after, before))
    row.update(outputs=outputs, gradients=gradients)
    for name, backward in (("forward", False), ("backward", True)):
        times = [_times(each, positional, named, backward=backward) for each in (layer, patched)]
        row[name] = [round(min(each), 2) for each in times]
    return row


def _by(table: Any) -> str:
    if any(row.fused for row in table):
        return "fused"
    return "core" if table else "left"


def _spread(layer: nn.Module) -> nn.Module:
    """The layer with offsets and weights that depend on the query."""
    for name, parameter in layer.named_parameters():
        if name in ("sampling_offsets.weight", "attention_weights.weight"):
            nn.init.normal_(parameter, std=0.02)
    return layer.eval()


def _results(layer: nn.Module, positional: Any, named: Any) -> tuple[list[Any], list[Any]]:
    outputs = _tensors(layer(*positional, **named))
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    leaves = [each for each in _tensors((positional, tuple(named.values()))) if each.requires_grad] + weights
    torch.manual_seed(2)
    # Not rand_like, which draws in the order of memory.
    loss = sum((each * torch.rand(each.shape)).sum() for each in outputs)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [each.detach() for each in outputs], list(gradients)


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [each for one in given for each in _tensors(one)] if isinstance(given, (tuple, list)) else []


def _distance(found: list[Any], expected: list[Any]) -> float:
    """The largest difference as a share of the largest number, over all tensors."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            worst = max(worst, 0.0 if a is b else float("inf"))
        else:
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst


def _times(layer: nn.Module, positional: Any, named: Any, *, backward: bool) -> list[float]:
    """Milliseconds of some runs, after a warm-up."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        if backward:
            _results(layer, positional, named)
        else:
            with torch.no_grad():
                layer(*positional, **named)
        found.append(1e3 * (time.perf_counter() - start))
    return found[1:]


def _stand_in(record: Record) -> str:
    """The verdict on the class's stand-in in the tests."""
    kind = getattr(layers_today, record.stand_in, None) or getattr(
        layers_of_others, record.stand_in or "_", None
    )
    return "" if kind is None else _by(vitkern.patch(kind()))
