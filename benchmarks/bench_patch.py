# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_patch: the cost of vitkern.patch, once for each class of layers and at each call.

Seconds are medians of five first patches: each repeat compiles the source of the classes again, one line further down,
so that no proof and no cached facts about the code exist. A row is printed only if every layer was replaced after the
stated number of trials. The check of a patched layer is the least of 20 rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

import vitkern
from benchmarks.harness import machine
from tests import layers_of_others
from vitkern.compat.trial import judge

SOURCE = Path(layers_of_others.__file__).read_text(encoding="utf-8")
SIZES = dict(n_levels=4, n_heads=8, n_points=4)
CALLS, ROUNDS, CHECK_TARGET = 2000, 20, 2.0  # microseconds

Models = Callable[[ModuleType], nn.Module]
_numbers = itertools.count(1)


def fresh_module() -> ModuleType:
    """A new module with new classes of the layers."""
    number = next(_numbers)
    module = ModuleType(f"layers_of_others_{number}")
    exec(compile("\n" * number + SOURCE, layers_of_others.__file__, "exec"), vars(module))
    return module


def deformable_detr(channels: int, layers: int = 1) -> Models:
    return lambda module: nn.ModuleList(module.MSDeformAttn(channels, **SIZES) for _ in range(layers))


def mmcv(channels: int) -> Models:
    return lambda module: nn.ModuleList([module.MultiScaleDeformableAttention(channels, num_levels=4)])


# The subject, its target in seconds, a function that makes it, and how many trials it takes.
ROWS: tuple[tuple[str, float, Models, int], ...] = (
    ("Deformable-DETR's layer, 256 channels", 0.3, deformable_detr(256), 1),
    ("Deformable-DETR's layer, 512 channels", 0.3, deformable_detr(512), 1),
    ("Deformable-DETR's layer, 1024 channels", 1.0, deformable_detr(1024), 1),
    ("Deformable-DETR's layer, 2048 channels", 1.0, deformable_detr(2048), 1),
    ("mmcv's layer, 256 channels", 0.3, mmcv(256), 1),
    ("a Deformable-DETR, 12 layers", 0.5, deformable_detr(256, 12), 1),
    ("an equal model, patched second", 0.5, deformable_detr(256, 12), 0),
)


def seconds_to_patch(make: Models, trials: int) -> float:
    """Seconds of the first patch of a model; with 0 `trials`, of the patch of a second, equal model."""
    module = fresh_module()
    if trials == 0:
        vitkern.patch(make(module))
    model, before = make(module), judge.count()
    started = time.perf_counter()
    table = vitkern.patch(model)
    seconds = time.perf_counter() - started
    replaced = sum(len(row.paths) for row in table)
    assert replaced == len(list(model.children())) and judge.count() - before == trials, str(table)
    return seconds


def least_microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def calls_of_a_patched_layer() -> dict[str, float]:
    """Microseconds of the check, and of a call with an empty kernel: check, arguments and torch's module call."""
    (layer,) = model = deformable_detr(256)(fresh_module())
    vitkern.patch(model)
    proof = type(layer).patched_by
    tensors = torch.zeros(1, 5, 256), torch.zeros(1, 5, 4, 2), torch.zeros(1, 4, 256)
    levels = torch.ones(4, 2, dtype=torch.int64), torch.arange(4)
    assert proof.changed(layer) is None and layer(*tensors, *levels).shape == tensors[0].shape
    check = least_microseconds(lambda: proof.changed(layer))
    proof._forward = lambda layer, **given: None
    return {"check": check, "call": least_microseconds(lambda: layer(*tensors, *levels))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--match", default="", help="only rows whose text contains this")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"{machine()}\n{'patched for the first time':<46}{'trials':>7}{'least s':>9}{'median s':>10}{'target':>8}"
    )
    print(f"{'the first of the process':<46}{1:>7}{seconds_to_patch(deformable_detr(256), 1):>19.3f}")
    for label, target, make, trials in ROWS:
        if given.match in label:
            seconds = [seconds_to_patch(make, trials) for _ in range(given.repeats)]
            least, median = min(seconds), statistics.median(seconds)
            print(f"{label:<46}{trials:>7}{least:>9.3f}{median:>10.3f}{target:>8.1f}", flush=True)
    check, call = calls_of_a_patched_layer().values()
    print(f"{'each call of a patched layer':<62}{'least us':>10}{'target':>8}")
    print(f"{'check of code and configuration':<62}{check:>10.2f}{CHECK_TARGET:>8.1f}")
    print(f"{'all but the kernel':<62}{call:>10.2f}")


if __name__ == "__main__":
    main()
