# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmarks of adapter and token ops: a table of times and memory against plain torch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import arguments, machine
from vitkern.bench.measure import forward_backward, interleaved, peak_megabytes
from vitkern.bench.verify import agree


@dataclass(frozen=True)
class Row:
    """The implementations by name, including "vitkern" and "eager", and their arguments."""

    functions: dict[str, Callable[..., Tensor]]
    inputs: tuple[Tensor, ...]  # in float32
    dtype: torch.dtype
    wanted: tuple[bool, ...] = ()  # of which inputs the gradient is; none: forward only


def measure(row: Row, compiles: bool, seconds: float) -> tuple[dict[str, float], dict[str, float]] | None:
    """Milliseconds of each, and megabytes of the first two; None if results differ."""
    if not agree(row.functions["vitkern"], row.functions["eager"], row.inputs, row.dtype):
        return None
    inputs = tuple(tensor.to(row.dtype) for tensor in row.inputs)
    for tensor, wanted in zip(inputs, row.wanted):
        tensor.requires_grad_(wanted)
    functions = dict(row.functions)
    if compiles:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(functions["eager"], dynamic=False)
    with torch.set_grad_enabled(any(row.wanted)):
        wrap = forward_backward if any(row.wanted) else lambda run, inputs: functools.partial(run, *inputs)
        variants = {name: wrap(function, inputs) for name, function in functions.items()}
        best = {name: min(times) for name, times in interleaved(variants, seconds=seconds).items()}
        return best, {name: peak_megabytes(variants[name]) for name in ("vitkern", "eager")}


def print_table(
    description: str, heading: str, columns: tuple[str, ...], rows: Iterable[tuple[str, Callable[[], Row]]]
) -> None:
    """Prints a line for each label and requested row; `columns`: the implementations that vitkern is compared with."""
    given = arguments(description, seconds=15.0, compiles=True)
    compiles = not given.no_compile and shutil.which("g++") is not None
    print(machine())
    ratios = "".join(f"{name + ' ms':>13}{'ratio':>7}" for name in columns)
    print(f"{heading}{'vitkern ms':>10}{ratios}{'vitkern MB':>12}{'eager MB':>10}")
    for label, make in rows:
        if given.match not in label:
            continue
        measured = measure(make(), compiles, given.seconds)
        if measured is None:
            print(f"{label}  results differ: not timed")
            continue
        best, peak = measured
        ours = best["vitkern"]
        cells = "".join(
            f"{best[name]:>13.2f}{best[name] / ours:>6.2f}x" if name in best else f"{'-':>20}"
            for name in columns
        )
        print(f"{label}{ours:>10.2f}{cells}{peak['vitkern']:>12.1f}{peak['eager']:>10.1f}", flush=True)
