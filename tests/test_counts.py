# SPDX-License-Identifier: Apache-2.0
"""The counter of emulated kernels gives counts that are known by hand, and no kernel accesses memory unseen by it."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from benchmarks.counts import counter
from tests import emulated

pytestmark = [
    pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON)),
    pytest.mark.xdist_group("counts"),  # one worker builds what counts
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A function that runs all kernels of tests/emulator/counts.cu and returns the counts of each."""
    built = emulated.compile_program("counts.cu", tmp_path_factory.mktemp("counts"), watch="counts")

    def run(**variables: str) -> dict[str, counter.Row]:
        environment = os.environ | {f"CUDA_EMU_{name}": value for name, value in variables.items()}
        said = subprocess.run([built], capture_output=True, text=True, check=True, env=environment).stdout
        return {row["kernel"]: row for row in map(json.loads, said.splitlines()) if "kernel" in row}

    return run


@pytest.fixture(scope="module")
def known(program):
    return program()


# Each kind of access: bytes of a lane, requests, sectors and lines in global memory; bytes, requests, and wavefronts
# at least and at most in shared memory. A transpose writes rows and reads columns: one, two and 32 lanes a bank.
GLOBAL = {
    "copy": {"load": (4, 32, 128, 32), "store": (4, 32, 128, 32)},
    "copy_vectors": {"load": (16, 32, 512, 128), "store": (16, 32, 512, 128)},
    "transpose_1": {"load": (4, 32, 128, 32), "store": (4, 32, 128, 32)},
    "stride_2": {"load": (4, 8, 8 * 8, 8 * 2), "store": (4, 8, 32, 8)},
    "stride_32": {"load": (4, 8, 8 * 32, 8 * 32), "store": (4, 8, 32, 8)},
    "add_to_one": {"reduction": (4, 32, 32, 32)},
    "add_rows": {"reduction": (16, 32, 32 * 16, 32 * 4)},
    "gather": {"load": (16, 8, 8 * 16, 8 * 4), "store": (16, 8, 8 * 16, 8 * 4)},
    "uneven": {"load": (4, 30, 30, 30), "store": (4, 1, 4, 1)},  # no lane reads in the last of 31 rounds
    "two_ways_of_calling": {"load": (4, 2, 8, 2), "store": (4, 1, 4, 1)},
    "copy_some": {"copy from": (16, 1, 4, 1), "store": (4, 1, 4, 1)},
    "copy_and_multiply": {"copy from": (16, 1, 16, 4), "store": (4, 1, 4, 1)},
}
SHARED = {
    "transpose_1": {"load": (4, 32, 32, 32), "store": (4, 32, 32, 32)},
    "transpose_2": {"load": (4, 32, 64, 64), "store": (4, 32, 32, 32)},
    "transpose_32": {"load": (4, 32, 1024, 1024), "store": (4, 32, 32, 32)},
    "copy_some": {"load": (4, 1, 4, 4), "copy to": (16, 1, 4, 4)},  # every fourth word: four to a bank
    # Rows of 48 bytes: the eight of each matrix are in eight times four banks; of the four that a quarter of the
    # copying warp fills, the first and the last share banks.
    "copy_and_multiply": {"load": (16, 1, 4, 4), "copy to": (16, 1, 4, 8)},
}
REDUCTIONS = {  # all, different ones of each block, sectors that get any, most of a sector
    "copy": (0, 0, 0, 0),
    "add_to_one": (1024, 4, 1, 1024),
    "add_rows": (1024, 1024, 128, 8),
}


@pytest.mark.parametrize("kernel", GLOBAL)
def test_requests_to_global_memory_are_known_by_hand(known, kernel):
    rows = known[kernel]["global"]
    assert {r["what"]: (r["bytes"], r["requests"], r["sectors"], r["lines"]) for r in rows} == GLOBAL[kernel]
    assert known[kernel]["outside"] == 0


@pytest.mark.parametrize("kernel", SHARED)
def test_wavefronts_are_known_by_hand(known, kernel):
    rows = known[kernel]["shared"]
    assert {r["what"]: (r["bytes"], r["requests"], r["least"], r["most"]) for r in rows} == SHARED[kernel]


@pytest.mark.parametrize("kernel", REDUCTIONS)
def test_reductions_are_known_by_hand(known, kernel):
    assert tuple(known[kernel]["reductions"].values()) == REDUCTIONS[kernel]


def test_loops_go_round_as_often_as_their_longest_lane(known):
    (loop,) = known["uneven"]["loops"]
    assert (loop["trips"], loop["lanes"]) == (31, sum(range(32)))


def test_barriers_and_waits_for_loads(known):
    assert [(known[k]["barriers"], known[k]["waits"]) for k in ("copy", "transpose_1", "add_rows")] == [
        (0, 1),
        (1, 1),
        (0, 0),
    ]


@pytest.mark.parametrize(("cache", "missed"), [("1x1x8", 64), ("1x1x16", 64), ("1x1x4", 128), ("1x1x2", 128)])
def test_l1_keeps_what_fits_and_nothing_else(program, cache, missed):
    """64 lines are read in order, twice. 8 KB hold them; smaller caches evict each line before it is read again."""
    ((found,),) = [
        [one for one in row["l1"] if one["tensor"] == "from"]
        for name, row in program(L1=cache).items()
        if name == "read_twice"
    ]
    assert found["sectors"] == 128 * 4
    assert found["together"] == found["one by one"]
    if cache != "1x1x8":  # several sets, and lines are not spread evenly
        assert found["together"] == 4 * missed
    else:
        assert 4 * missed <= found["together"] < 8 * missed


# ---- Our kernels


OPS = ("ms_deform_attn", "adapter_bottleneck", "token_pool", "token_project")
_BEYOND = re.compile(
    r"\b(asm|__asm__|volatile|mem(?:cpy|set|move)|std::(?:copy|fill)\w*|__builtin_mem\w+)\b[^;]*"
)
_HARMLESS = ("memcpy(&vector, &bits, sizeof vector)",)  # from registers to registers


def beyond_the_counter(text: str) -> list[str]:
    """Memory accesses in preprocessed text that the compiler's hooks do not report, except the emulator's own."""
    found, own = [], False
    for line in text.splitlines():
        if marker := re.match(r'# \d+ "(.*?)"', line):
            own = marker[1].endswith(".cuh") and "/emulator/" not in marker[1]
        elif own:
            found += [match[0] for match in _BEYOND.finditer(line) if match[0] not in _HARMLESS]
    return found


@pytest.mark.parametrize("op", OPS)
def test_kernels_reach_memory_by_no_way_that_is_not_counted(op):
    flags = ["-std=c++17", "-E", "-DVITKERN_EMULATED", "-DVITKERN_WATCHED", f"-I{counter.CSRC}", "-x", "c++"]
    source = counter.CSRC / op / "cuda.cu"
    text = subprocess.run(["c++", *flags, source], capture_output=True, text=True, check=True).stdout
    assert f'{op}/forward.cuh"' in text
    assert beyond_the_counter(text) == []
    for planted in ("memcpy(out, in, 16);", 'asm("ld.global");'):
        assert beyond_the_counter(text + f'\n# 1 "{op}/planted.cuh"\n  {planted}\n') != []
