# SPDX-License-Identifier: Apache-2.0
"""The rates of a card that turn counts into least times, measured by the kernels of rates.cu.

nvcc, which `make gpu` needs anyway, makes a shared library of that one file, and ctypes calls it. This takes no ninja,
no headers of torch or Python, and no new build of the package. In the tests the emulator makes one.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import ROOT, STATE
from benchmarks.static import compilers
from vitkern.bench.cuda_clock import CudaClock, Sample
from vitkern.commands.errors import CommandError

SOURCE = Path(__file__).with_name("rates.cu")
THREADS, WARP, LANES, AT_ONCE, SHARED_AT_ONCE = 256, 32, 8, 8, 4  # as in rates.cu
STRIDES = {"gather_l1": 16, "gather_l2": 512}  # rows between those of a turn
ROW = 128  # bytes
SAMPLES = 5


@dataclass(frozen=True)
class Card:
    """The figures that sizes follow from."""

    multiprocessors: int
    l2_bytes: int
    capability: tuple[int, int]
    threads: int = 2048  # of a multiprocessor at a time

    @property
    def blocks(self) -> int:
        """As many as run at a time: a last few that ran alone would make the card look slower."""
        return self.threads // THREADS * self.multiprocessors

    @property
    def rows(self) -> int:
        """Rows that fit a quarter of L2: a power of two."""
        return 1 << (max(self.l2_bytes // 4, ROW) // ROW).bit_length() - 1


def card_of(properties: Any) -> Card:
    return Card(
        properties.multi_processor_count,
        properties.L2_cache_size,
        (properties.major, properties.minor),
        properties.max_threads_per_multi_processor,
    )


# ---- The library


def command(capability: tuple[int, int], library: Path) -> list[str]:
    arch = "".join(map(str, capability))
    words = [compilers.nvcc() or "nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    words += [f'-DVITKERN_CUDA_ARCHITECTURES="{arch}"', "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [*words, "-o", str(library), str(SOURCE)]


def built(capability: tuple[int, int]) -> Path:
    """The library for a card; a change of its sources makes another file."""
    sources = (SOURCE, ROOT / "csrc/common/atomics.cuh", ROOT / "csrc/common/launch.cuh")
    digest = hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest()[:12]
    library = STATE / f"rates-sm_{''.join(map(str, capability))}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".part")
        done = subprocess.run(command(capability, unfinished), capture_output=True, text=True)
        if done.returncode:
            raise CommandError(f"nvcc does not compile {SOURCE.name}: {done.stderr.strip()[-400:]}")
        unfinished.replace(library)
    return library


Kernels = Callable[..., None]


def kernels_of(path: Path, stream: Callable[[], int]) -> Kernels:
    """`kernels(name, ...)` starts a kernel on the stream with the blocks, tensors and numbers that it takes."""
    library = ctypes.CDLL(str(path))

    def start(name: str, *arguments: int | Tensor, blocks: int | None = None) -> None:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        given = [
            ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_uint32(one)
            for one in arguments
        ]
        size = [] if blocks is None else [ctypes.c_uint32(blocks)]
        error = function(*size, ctypes.c_void_p(stream()), *given)
        if error is not None:
            raise RuntimeError(error.decode())

    return start


# ---- What is measured


@dataclass(frozen=True)
class Rate:
    """A microbenchmark: `make` returns the call to time, and how many of `unit` (without the second) it does."""

    name: str
    unit: str
    what: str
    make: Callable[[Kernels, Card, torch.device], tuple[Callable[[], None], float]]
    of_each: bool = False  # of each multiprocessor
    latency: bool = False  # the time of one is the figure, in nanoseconds


def _gather(name: str, rows: int | None, turns: int) -> Callable:
    def make(kernels: Kernels, card: Card, device: torch.device) -> tuple[Callable[[], None], float]:
        many = rows or card.rows
        size = many + (AT_ONCE - 1) * STRIDES[name], ROW // 4
        source = torch.randint(2**31 - 1, size, dtype=torch.int32, device=device)
        out = torch.empty(card.blocks * THREADS, dtype=torch.int32, device=device)
        moved = card.blocks * THREADS // LANES * turns * AT_ONCE * ROW
        return lambda: kernels(name, source, many, turns, out, blocks=card.blocks), moved

    return make


def _add(rows: int | None, turns: int) -> Callable:
    def make(kernels: Kernels, card: Card, device: torch.device) -> tuple[Callable[[], None], float]:
        many = rows or card.rows
        sums = torch.zeros(many, ROW // 4, device=device)
        return lambda: kernels("add_to_rows", sums, many, turns, blocks=card.blocks), (
            card.blocks * THREADS * turns
        )

    return make


def _shared(alike: int, wavefronts: int, turns: int = 4096) -> Callable:
    def make(kernels: Kernels, card: Card, device: torch.device) -> tuple[Callable[[], None], float]:
        words = torch.randint(2**31 - 1, (WARP * SHARED_AT_ONCE, 4), dtype=torch.int32, device=device)
        out = torch.empty(card.blocks * THREADS, dtype=torch.int32, device=device)
        done = card.blocks * THREADS // WARP * turns * SHARED_AT_ONCE * wavefronts
        return lambda: kernels("read_shared", words, alike, turns, out, blocks=card.blocks), done

    return make


def chain(lines: int, device: torch.device) -> Tensor:
    """Lines of 128 bytes, each with the address of the next one in a circle without order."""
    order = torch.randperm(lines, generator=torch.Generator().manual_seed(0)).to(device)
    found = torch.zeros(lines, ROW // 8, dtype=torch.int64, device=device)
    found[order, 0] = found.data_ptr() + ROW * order.roll(-1)
    return found


def _follow(name: str, lines: Callable[[Card], int], steps: int, warm: bool = True) -> Callable:
    def make(kernels: Kernels, card: Card, device: torch.device) -> tuple[Callable[[], None], float]:
        line = chain(lines(card), device)
        where = torch.full((1,), line.data_ptr(), dtype=torch.int64, device=device)
        if warm:
            kernels(name, where, len(line))  # once round
        # The chain belongs to the call: nothing else keeps its memory.
        return lambda line=line: kernels(name, where, steps), steps

    return make


RATES = (
    Rate(
        "rows from L1",
        "bytes",
        "rows of 128 bytes, 128 of them, loaded in no order",
        _gather("gather_l1", 16, 2**11),
    ),
    Rate(
        "rows from L2",
        "bytes",
        "rows of 128 bytes from a quarter of L2, in no order, past L1",
        _gather("gather_l2", None, 2**7),
    ),
    Rate(
        "adds to random rows",
        "adds",
        "16 bytes of floats added to rows in a quarter of L2, eight lanes to a row",
        _add(None, 2**10),
    ),
    Rate("adds to one row", "adds", "the same, all to one row", _add(1, 16)),
    Rate(
        "wavefronts",
        "wavefronts",
        "shared loads of 16 bytes, all lanes different ones: four wavefronts each",
        _shared(1, 4),
        of_each=True,
    ),
    Rate(
        "broadcast loads",
        "loads",
        "shared loads of 16 bytes, eight neighbours the same ones",
        _shared(8, 1),
        of_each=True,
    ),
    Rate(
        "L1 latency",
        "loads",
        "loads of a chain of 16 lines",
        _follow("follow_l1", lambda card: 16, 2**16),
        latency=True,
    ),
    Rate(
        "L2 latency",
        "loads",
        "loads of a chain through a quarter of L2, past L1",
        _follow("follow_l2", lambda card: card.rows, 2**15),
        latency=True,
    ),
    Rate(
        "DRAM latency",
        "loads",
        "loads of a chain through four times L2",
        _follow("follow_l2", lambda card: 16 * card.rows, 2**13, warm=False),
        latency=True,
    ),
)


def measure(
    rate: Rate, kernels: Kernels, card: Card, device: torch.device, clock: CudaClock
) -> dict[str, Any]:
    """The figure of the fastest sample, and the samples."""
    run, count = rate.make(kernels, card, device)
    calls = clock.calls(run)
    samples: list[Sample] = []
    for _ in range(SAMPLES):
        clock.milliseconds(run, calls)
        assert clock.last is not None
        samples.append(clock.last)
    seconds = min(one.device_ms for one in samples) / 1e3
    figure = 1e9 * seconds / count if rate.latency else count / seconds
    return {
        "figure": figure / card.multiprocessors if rate.of_each else figure,
        "samples_ms": [one.device_ms for one in samples],
        "megahertz": [round(one.megahertz, 1) for one in samples],
    }


def unit_of(rate: Rate) -> str:
    return "ns" if rate.latency else f"{rate.unit}/s{' of a multiprocessor' if rate.of_each else ''}"
