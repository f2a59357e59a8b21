# SPDX-License-Identifier: Apache-2.0
"""Runs emulated kernels in the counting build (csrc/emulator/counts.cpp), and reads the counts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from tests import emulated, races
from vitkern.ops import native, op

Row = dict[str, Any]
CSRC = emulated.ROOT / "csrc"


@functools.cache
def path() -> Path:
    """The compiled module; if VITKERN_EMULATED_COUNTS names one, it is not built."""
    return Path(os.environ.get("VITKERN_EMULATED_COUNTS") or emulated.build(watch="counts"))


@functools.cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_emulated", path())
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def library(binary: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(binary))
    loaded.vitkern_counts_take.restype = ctypes.c_char_p
    loaded.vitkern_counts_name.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    return loaded


@dataclass
class Counted:
    """The counts of a call: a row for each launch, and the bytes that were zero-filled or allocated as workspace."""

    name: Callable[[str, Tensor], None]  # tells accesses to a tensor apart from others, by a word
    launches: list[Row] = field(default_factory=list)
    filled: int = 0
    workspace: int = 0


@contextlib.contextmanager
def counting(binary: Path, names: Mapping[str, Tensor], **variables: object) -> Iterator[Counted]:
    """A context that counts launches; accesses are assigned to the tensors of `names` and to allocated ones.

    EVERY=16: counts every 16th block; REST: the kernel whose other blocks run too; L1=132x4x192: models the caches.
    """
    calls = library(binary)

    def name(what: str, tensor: Tensor) -> None:
        bytes_ = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        short = "zeros" if "of zeros" in what else what.split(" ")[0]
        calls.vitkern_counts_name(short.encode(), tensor.data_ptr(), bytes_)
        found.filled += bytes_ if short == "zeros" else 0
        found.workspace += bytes_ if short == "workspace" else 0

    found = Counted(name)
    calls.vitkern_counts_take()
    for given, tensor in names.items():
        name(given, tensor)
    with races.variables(**variables), races.named_outputs(name):
        yield found
    *launches, last = (json.loads(line) for line in calls.vitkern_counts_take().decode().splitlines())
    found.launches += [dict(row, binary=binary) for row in launches]
    found.filled += last["filled"]
    nameless = [row["kernel"] for row in launches if row["outside"]]
    if nameless:
        raise RuntimeError(
            f"{', '.join(nameless)}: memory is read or written that no tensor is known to have"
        )


@contextlib.contextmanager
def kernels_that_count() -> Iterator[None]:
    """A context in which the ops run the kernels of the counting module."""
    op.forget_plans()
    try:
        with mock.patch.object(native, "cuda_module", module()):
            yield
    finally:
        op.forget_plans()


# ---- From places in the machine code to lines of the sources


@functools.cache
def _source(file: Path) -> list[str]:
    return file.read_text().splitlines()


def _shown(place: Path) -> str:
    return f"{place.parent.name}/{place.name}"


def _loop(place: Path) -> str | None:
    """The line of a loop that remains in machine code: it has a head, and no pragma unrolls it completely."""
    file, number = str(place).rsplit(":", 1)
    if not Path(file).is_file() or "emulator" in Path(file).parts[:-1] or not number.isdigit():
        return None
    lines = _source(Path(file))
    for line in range(int(number), max(int(number) - 3, 0), -1):
        if re.search(r"\b(for|while) \(|\bdo\b", lines[line - 1]):
            unrolled = lines[line - 2].strip() == "#pragma unroll"
            return None if unrolled else f"{_shown(Path(file))}:{line}"
    return None


def lines_of(rows: list[Row]) -> dict[tuple[Path, int], list[Path]]:
    """For each place in these launches, the source lines of its call stack, innermost first."""
    wanted: dict[Path, set[int]] = {}
    for row in rows:
        places = wanted.setdefault(row["binary"], set())
        places |= {one["place"] for one in (*row["sites"], *row["loops"])}
    found = {}
    for binary, places in wanted.items():
        addresses = [hex(place) for place in sorted(places)]
        for address, lines in zip(addresses, races.calls_to(addresses, binary) if addresses else ()):
            found[binary, int(address, 16)] = lines
    return found


def with_lines(rows: list[Row]) -> list[Row]:
    """The launches with lines of loops instead of places; `within` of a site lists the lines of its call stack."""
    lines = lines_of(rows)
    for row in rows:
        loops: dict[str, list[int]] = {}
        for one in row["loops"]:
            places = lines[row["binary"], one["place"]]
            if places and (name := _loop(places[0])):
                sums = loops.setdefault(name, [0, 0])
                sums[0] += one["trips"]
                sums[1] += one["lanes"]
        row["loops"] = loops
        for site in row["sites"]:
            site["within"] = [_shown(place) for place in lines[row["binary"], site["place"]]]
    return rows
