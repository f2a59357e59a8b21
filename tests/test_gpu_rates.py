# SPDX-License-Identifier: Apache-2.0
"""The microbenchmarks of `make gpu PART=model` without a card: their machine code, and what they do in the emulator."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.counts import counter
from benchmarks.gpu import rates
from benchmarks.gpu.rates import RATES, Card
from benchmarks.static import compilers, sass
from tests import emulated
from tests.fake_card import FakeCard
from vitkern.commands.errors import CommandError

CARD = Card(132, 52428800, (9, 0))
CPU = torch.device("cpu")

# ---- The kernels, as nvcc compiles them

needs_nvcc = pytest.mark.skipif(
    compilers.nvcc() is None or sass.cuobjdump() is None, reason="needs nvcc and cuobjdump"
)


@pytest.fixture(scope="module", params=[80, 90], ids=lambda arch: f"sm_{arch}")
def built(request, tmp_path_factory):
    """The library for an architecture, as a card's run makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "STATE", tmp_path_factory.mktemp("state"))
        library = rates.built(divmod(request.param, 10))
        assert rates.built(divmod(request.param, 10)) == library and list(rates.STATE.iterdir()) == [library]
    return request.param, library, compilers.by_name(sass.read(library))


MEMORY = r"(LD(?!C)|ST|RED|ATOM)"  # LDC reads arguments


def loop_of(kernel: sass.Kernel) -> Counter[str]:
    """The opcodes of the loop that has most instructions which reach memory."""
    loop = max(kernel.loops, key=lambda loop: kernel.count(loop.blocks, MEMORY))
    return Counter(i.opcode for block in loop.blocks for i in kernel.blocks[block].instructions)


# By architecture the one way to memory in the loop that counts, and how much of the loop it may leave to others.
@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, opcodes, others",
    [
        ("gather_rows<false, 16>", {80: "LDG.E.128.CONSTANT", 90: "LDG.E.128.CONSTANT"}, 4),
        ("gather_rows<true, 512>", {80: "LDG.E.128.STRONG.GPU", 90: "LDG.E.128.STRONG.GPU"}, 4),
        (
            "add_to_rows",
            {80: "RED.E.ADD.F32.FTZ.RN.STRONG.GPU", 90: "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU"},
            14,
        ),
        ("read_shared", {80: "LDS.128", 90: "LDS.128"}, 2),
        ("follow<false>", {80: "LDG.E.64.CONSTANT", 90: "LDG.E.64.CONSTANT"}, 3),
        ("follow<true>", {80: "LDG.E.64.STRONG.GPU", 90: "LDG.E.64.STRONG.GPU"}, 3),
    ],
)
def test_the_loop_does_what_it_claims_to_measure_and_little_else(built, kernel, opcodes, others):
    arch, _, kernels = built
    code = kernels[kernel]
    loop = loop_of(code)
    found = {name: number for name, number in loop.items() if re.match(MEMORY, name)}
    assert set(found) == {opcodes[arch]}
    assert sum(loop.values()) - sum(found.values()) <= others * sum(found.values())
    assert code.stack == 0 and code.registers <= 32  # eight blocks fit


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what fails here")
def test_a_kernel_that_cannot_start_says_why(built):
    kernels = rates.kernels_of(built[1], lambda: 0)
    with pytest.raises(RuntimeError, match="vitkern: kernel follow_l1 .*: "):
        kernels("follow_l1", torch.zeros(1, dtype=torch.int64), 1)


def test_what_nvcc_does_not_compile_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "STATE", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "error: no such instruction\n")
    monkeypatch.setattr(rates.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CommandError, match="nvcc does not compile rates.cu: error: no such instruction"):
        rates.built((9, 0))


# ---- The kernels, in the emulator, and on a card where there is one

needs_emulator = pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON))
together = pytest.mark.xdist_group("rates")  # one worker builds the library
no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = Card(1, 2**15, (9, 0))  # a quarter of its L2 has 64 rows


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    flags = ["-shared", "-fvisibility=hidden"]
    return emulated.compile_program(
        rates.SOURCE, tmp_path_factory.mktemp("rates"), watch="counts", flags=flags
    )


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=[needs_emulator, pytest.mark.slow], id="emulated"),
        pytest.param("cuda", marks=[pytest.mark.gpu, no_card], id="card"),
    ]
)
def started(request):
    """Starts a kernel on tensors of the CPU, there or on copies on the card, and returns what has become of them."""
    if request.param == "cpu":
        kernels = rates.kernels_of(request.getfixturevalue("library"), lambda: 0)
    else:
        built = rates.built(torch.cuda.get_device_capability())
        kernels = rates.kernels_of(built, lambda: torch.cuda.current_stream().cuda_stream)

    def start(name: str, *arguments, blocks: int | None = None) -> list[np.ndarray]:
        given = [one.to(request.param) if isinstance(one, torch.Tensor) else one for one in arguments]
        kernels(name, *given, blocks=blocks)
        return [one.cpu().numpy() for one in given if isinstance(one, torch.Tensor)]

    start.kernels, start.device = kernels, torch.device(request.param)
    return start


def scattered(turn: np.ndarray) -> np.ndarray:
    """As in rates.cu."""
    turn = turn.astype(np.uint32) * np.uint32(0x9E3779B1)
    turn = (turn ^ turn >> np.uint32(15)) * np.uint32(0x85EBCA77)
    return turn ^ turn >> np.uint32(13)


def rows_of_teams(blocks: int, rows: int, turns: int) -> np.ndarray:
    """[teams, turns]"""
    teams = blocks * rates.THREADS // rates.LANES
    drawn = scattered(np.arange(teams * turns).reshape(teams, turns))
    return (drawn & ~np.uint32(3) | np.arange(teams, dtype=np.uint32)[:, None] % 4) & np.uint32(rows - 1)


def test_rows_come_in_no_order_and_about_as_often():
    found = np.bincount(rows_of_teams(8, 256, 1024).reshape(-1), minlength=256)
    assert found.mean() == 1024 and found.min() > 0.8 * 1024 and found.max() < 1.2 * 1024


@together
@pytest.mark.parametrize("kernel", ["gather_l1", "gather_l2"])
def test_rows_are_gathered(started, kernel):
    rows, turns, blocks, stride = 64, 3, 2, rates.STRIDES[kernel]
    size = rows + (rates.AT_ONCE - 1) * stride
    source = torch.randint(2**31 - 1, (size, 32), dtype=torch.int32)
    out = torch.empty(blocks * rates.THREADS, dtype=torch.int32)
    _, found = started(kernel, source, rows, turns, out, blocks=blocks)
    words = np.bitwise_xor.reduce(source.numpy().reshape(size, rates.LANES, 4), -1)
    drawn = rows_of_teams(blocks, rows, turns)[..., None] + stride * np.arange(rates.AT_ONCE)
    expected = np.bitwise_xor.reduce(words[drawn], (1, 2))
    assert np.array_equal(found, expected.reshape(-1))


@together
@pytest.mark.parametrize("rows", [64, 1])
def test_rows_are_added_to(started, rows):
    turns, blocks = 4, 2
    (found,) = started("add_to_rows", torch.zeros(rows, 32), rows, turns, blocks=blocks)
    expected = np.bincount(rows_of_teams(blocks, rows, turns).reshape(-1), minlength=rows)
    assert np.array_equal(found, np.repeat(expected[:, None], 32, 1))


@together
@pytest.mark.parametrize("alike", [1, 8, 32])
def test_shared_memory_is_read(started, alike):
    words, out = torch.randint(2**20, (128, 4), dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    _, found = started("read_shared", words, alike, 3, out, blocks=1)
    lanes = np.arange(rates.THREADS) % 32 // alike
    expected = 3 * words.numpy()[lanes[:, None] + 32 * np.arange(rates.SHARED_AT_ONCE), 0].sum(1)
    assert np.array_equal(found, expected)


@together
@pytest.mark.parametrize("kernel", ["follow_l1", "follow_l2"])
def test_a_chain_is_followed_and_gone_on_with(started, kernel):
    lines = rates.chain(50, started.device)
    where = torch.tensor([lines.data_ptr()], device=started.device)
    seen = []
    for steps in (1, 49, 7, 43):
        started.kernels(kernel, where, steps)
        seen.append((where.item() - lines.data_ptr()) / rates.ROW)
    assert seen[1] == seen[3] == 0.0 and len(set(seen)) == 3
    order = (lines[:, 0].cpu().numpy() - lines.data_ptr()) // rates.ROW
    assert sorted(order) == list(range(50)) and seen[0] == order[0]


COUNTS = {  # with sizes that take no time; and which of the emulator's counts is the same
    "rows from L1": (rates._gather("gather_l1", 16, 2), lambda row: 32 * row["global"][0]["sectors"]),
    "rows from L2": (rates._gather("gather_l2", None, 2), lambda row: 32 * row["global"][0]["sectors"]),
    "adds to random rows": (rates._add(None, 2), lambda row: row["reductions"]["adds"]),
    "adds to one row": (rates._add(1, 2), lambda row: row["reductions"]["adds"]),
    "wavefronts": (rates._shared(1, 4, turns=2), lambda row: loads_of(row)["least"]),
    "broadcast loads": (rates._shared(8, 1, turns=2), lambda row: loads_of(row)["requests"]),
    "L1 latency": (
        rates._follow("follow_l1", lambda card: 16, 20),
        lambda row: row["global"][0]["requests"],
    ),
}


def loads_of(row: counter.Row) -> dict:
    return next(one for one in row["shared"] if one["what"] == "load")


@needs_emulator
@together
@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_a_microbenchmark_counts_as_the_counts_do(library, name, monkeypatch):
    """Rates and counts are of the same things: the emulator counts what the figure is divided by."""
    (make, count), kernels = COUNTS[name], rates.kernels_of(library, lambda: 0)
    tensors: list[torch.Tensor] = []

    def start(name: str, *arguments, blocks: int | None = None) -> None:
        tensors.extend(one for one in arguments if isinstance(one, torch.Tensor))
        kernels(name, *arguments, blocks=blocks)

    chain = rates.chain
    monkeypatch.setattr(rates, "chain", lambda *sizes: tensors.append(chain(*sizes)) or tensors[-1])
    call, own = make(start, SMALL, CPU)
    call()
    with counter.counting(library, {f"tensor{i}": tensor for i, tensor in enumerate(tensors)}) as found:
        call()
    (row,) = found.launches
    row["global"].sort(key=lambda one: one["what"] != "load" or -one["requests"])
    assert count(row) == own


@needs_emulator
@together
@pytest.mark.slow
def test_a_broadcast_is_one_wavefront_or_four(library):
    """The range that the rate of broadcast loads narrows down."""
    words, out = torch.zeros(128, 4, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    with counter.counting(library, {"words": words, "out": out}) as found:
        rates.kernels_of(library, lambda: 0)("read_shared", words, 8, 1, out, blocks=1)
    loads = loads_of(found.launches[0])
    assert (loads["least"], loads["most"]) == (loads["requests"], 4 * loads["requests"])


def test_a_rate_is_the_count_over_the_fastest_sample():
    card, took = FakeCard(), iter([1.0] * 7 + [0.5] * 5 + [2.0] * 15)
    rate = replace(RATES[0], make=lambda *_: (lambda: card.call(0.1, next(took)), 1e6))
    clock = card.clock(flush=False)
    found = rates.measure(rate, None, CARD, CPU, clock)
    assert found["figure"] == pytest.approx(1e6 / 0.5e-3)
    assert found["samples_ms"] == pytest.approx([1.0, 0.5, 2.0, 2.0, 2.0])
    took = iter([1.0] * 27)
    assert rates.measure(replace(rate, of_each=True), None, CARD, CPU, clock)["figure"] == pytest.approx(
        1e9 / 132
    )
    took = iter([1.0] * 27)
    assert rates.measure(replace(rate, latency=True), None, CARD, CPU, clock)["figure"] == pytest.approx(1.0)


def test_sizes_follow_from_the_card():
    properties = {"multi_processor_count": 70, "L2_cache_size": 2**22, "major": 12, "minor": 0}
    other = rates.card_of(SimpleNamespace(**properties, max_threads_per_multi_processor=1536))
    assert (other.blocks, other.rows, other.capability) == (70 * 6, 2**13, (12, 0))
    assert (CARD.blocks, CARD.rows * rates.ROW) == (1056, 2**23)
    assert 2 * CARD.rows * rates.ROW > CARD.l2_bytes // 4 >= CARD.rows * rates.ROW
