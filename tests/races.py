# SPDX-License-Identifier: Apache-2.0
"""The emulated CUDA kernels in the build that looks for races: csrc/emulator/races.cpp says what a race is.

Variables control the build: CUDA_EMU_SEED draws a schedule, CUDA_EMU_WITHOUT names a barrier that then orders nothing
(``forward.cuh:24``), CUDA_EMU_BLOCKS limits the blocks that run of a launch, CUDA_EMU_RACES=0 turns the detector off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from tests import emulated
from vitkern.ops import native, op

CSRC = emulated.ROOT / "csrc"
MODULE = "VITKERN_EMULATED_RACES"
REASON = emulated.REASON or (None if MODULE in os.environ else "make races builds the kernels for this")


def path() -> Path:
    return Path(os.environ[MODULE])


@functools.cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_emulated", path())
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(path()))
    library.vitkern_races_launched.restype = ctypes.c_char_p
    library.vitkern_races_name.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    return library


@contextlib.contextmanager
def variables(**values: object) -> Iterator[None]:
    """Sets the variables SEED, WITHOUT, BLOCKS and RACES of the module's docstring; None leaves one unset."""
    given = {f"CUDA_EMU_{name}": str(value) for name, value in values.items() if value is not None}
    with mock.patch.dict(os.environ, given):
        yield


@contextlib.contextmanager
def kernels(names: Mapping[str, torch.Tensor] | None = None, **values: object) -> Iterator[None]:
    """A context in which the ops run this build's kernels; a race raises an error that names lines and tensors."""
    op.forget_plans()
    _library().vitkern_races_forget_names()
    for name, tensor in (names or {}).items():
        _name(name, tensor)
    try:
        with mock.patch.object(native, "cuda_module", module()), variables(**values), named_outputs(_name):
            yield
    except RuntimeError as error:
        raise RuntimeError(readable(str(error), path())) from None
    finally:
        op.forget_plans()


def _name(name: str, tensor: torch.Tensor) -> None:
    bytes_ = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    _library().vitkern_races_name(name.encode(), tensor.data_ptr(), bytes_)


@contextlib.contextmanager
def named_outputs(name: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """A context in which the tensors that a call allocates are named by their shapes."""

    def naming(allocate, what):
        def named(*args, **options):
            tensor = allocate(*args, **options)
            name(f"{what} {tuple(tensor.shape)}", tensor)
            return tensor

        return named

    new_empty, new_zeros, empty = torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.empty
    with (
        mock.patch.object(torch.Tensor, "new_empty", naming(new_empty, "output")),
        mock.patch.object(torch.Tensor, "new_zeros", naming(new_zeros, "output of zeros")),
        mock.patch.object(torch, "empty", naming(empty, "workspace")),
    ):
        yield


# ---- From addresses to sources


def readable(text: str, binary: Path) -> str:
    """The report with source lines and variables in place of {line 0x..} and {variable 0x..}."""
    addresses = sorted(set(re.findall(r"\{line (0x[0-9a-f]+)\}", text)))
    lines = dict(zip(addresses, _lines(addresses, binary)))
    text = re.sub(r"\{line (0x[0-9a-f]+)\}", lambda found: lines[found[1]], text)
    if "{variable" not in text:
        return text
    variables = _thread_variables(binary)
    return re.sub(r"\{variable (0x[0-9a-f]+)\}", lambda found: _variable(int(found[1], 16), variables), text)


def _lines(addresses: list[str], binary: Path) -> Iterator[str]:
    """For each address, the source lines of its call stack, innermost first, without those of the emulator."""
    for places in calls_to(addresses, binary):
        own = [place for place in places if place.parent.name != "emulator" or ".cu:" in place.name]
        yield " < ".join(f"{place.parent.name}/{place.name}" for place in own or places)


def calls_to(addresses: list[str], binary: Path) -> Iterator[list[Path]]:
    """For each return address, file:line of the call and of all functions that it was inlined into."""
    before = [hex(int(address, 16) - 1) for address in addresses]  # the call, not where it returns to
    command = ["addr2line", "--addresses", "--inlines", f"--exe={binary}", *before]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for lines in re.split(r"^0x[0-9a-f]+\n", told, flags=re.MULTILINE)[1:]:
        yield [Path(line.split(" ")[0]) for line in lines.splitlines()]


@functools.cache
def _thread_variables(binary: Path) -> list[tuple[int, int, str]]:
    """Offset, size and name of the variables that kernels declare __shared__."""
    told = subprocess.run(["readelf", "-sW", binary], capture_output=True, text=True, check=True).stdout
    rows = [row.split() for row in told.splitlines() if " TLS " in row]
    named = subprocess.run(
        ["c++filt"], input="\n".join(row[7] for row in rows), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        (int(row[1], 16), int(row[2], 0), name.rsplit("::", 1)[-1])
        for row, name in zip(rows, named)
        if row[6] != "UND"
    ]


def _variable(offset: int, variables: list[tuple[int, int, str]]) -> str:
    for begin, size, name in variables:
        if begin <= offset < begin + size:
            return f"{name} + {offset - begin} bytes"
    return f"thread-local memory + {offset} bytes"


# ---- The compiled kernels, and the barriers in their sources


def compiled_kernels() -> dict[int, str]:
    """Every kernel instance in the module by its address; the dispatch tables can select each of them."""
    sources = "\n".join(file.read_text() for file in sorted(CSRC.rglob("*.cuh")))
    names = set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", sources))
    told = subprocess.run(["nm", "-C", path()], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tTwW] void vitkern::((\w+)<[^(]*>)\(", told, re.MULTILINE)
    return {int(address, 16): whole for address, whole, name in found if name in names}


def launched_kernels() -> dict[str, int]:
    """For each kernel that has run in this process, the number of blocks of its largest launch."""
    told = (line.split() for line in _library().vitkern_races_launched().decode().splitlines())
    compiled = compiled_kernels()
    return {compiled[int(address)]: int(blocks) for address, blocks in told}


def barriers() -> list[str]:
    """Each barrier of the kernels as ``forward.cuh:24``, in the order of the files."""
    found = []
    for file in sorted(CSRC.rglob("*.cuh")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search(r"__sync(threads|warp)\w*\(", line.split("//")[0]):
                found.append(f"{file.parent.name}/{file.name}:{number}")
    return found


if __name__ == "__main__":  # python -m tests.races PROGRAM < REPORT
    print(readable(sys.stdin.read(), Path(sys.argv[1])), end="")
