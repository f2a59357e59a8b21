# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels made of matrix products, compiled without a card: nothing spills, tensor cores are used.

The kernels are compiled as for a launch with the shapes of tests/aot_compile_gemm.py. The limits are the figures of
Triton 3.9, rounded up; with other versions the kernels only have to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import compilers
from tests.helpers import of_cards

if reason := compilers.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MMA = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"}, 120: {"mma.sync"}}
MMA[100] = {"mma.sync", "tcgen05.mma"}
SHARED = 100 * 1024 - 1024  # bytes that a block may have on sm_120, the smallest of these cards

# By kernel: registers of a thread for 16-bit tensors, for floats that are multiplied in full.
REGISTERS = {
    "adapter_bottleneck_forward": (128, 96),
    "adapter_bottleneck_backward": (184, 168),
    "row_products": (136, 128),
    "token_pool_forward": (176, 224),
    "token_pool_merge": (48, 48),
    "token_pool_backward": (255, 255),
    "token_project_forward": (80, 80),
    "token_project_backward": (96, 120),
}


def compile_all(arch: int, *options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot_compile_gemm", "--arch", str(arch), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(
    scope="module", params=of_cards(sorted(MMA), "products of Triton"), ids=lambda arch: f"sm_{arch}"
)
def figures(request) -> list[dict]:
    return compile_all(request.param, "--dtype", "fp32", "bf16")


def test_nothing_spills(figures):
    for row in figures:
        assert row["registers"] <= REGISTERS[row["kernel"]][row["dtype"] == "fp32"], row
        # Where ptxas stops at a number of registers that lets one more block run, it puts some few aside once.
        assert row["stack"] <= 16, row
        assert row["shared"] <= SHARED, row


def test_16_bit_products_run_on_tensor_cores_and_float_ones_are_exact(figures):
    for row in figures:
        used = set(row["mma"])
        if row["kernel"] == "token_pool_merge" or row["dtype"] == "fp32":
            assert not used, row
        else:
            assert used, row
            assert used <= MMA[row["arch"]], row


def test_tiles_move_in_16_byte_accesses(figures):
    """Only numbers of a row or vector move in narrower accesses: biases, seed, scale, statistics, and sums of parts."""
    for row in figures:
        wide = [name for name in row["accesses"] if ".128" in name or name == "cp.async.16"]
        assert any(name.startswith(("LDG", "cp.async")) for name in wide), row
        if row["kernel"] != "token_pool_merge":  # stores one row
            assert any(name.startswith("STG") for name in wide), row


def test_tf32_where_torch_is_told_to_use_it():
    for row in compile_all(90, "--dtype", "fp32", "--tf32", "--case", "adapter-768-64", "project-256-16"):
        assert row["mma"], row


@pytest.mark.parametrize("arch", sorted(MMA))
def test_odd_sizes_compile(arch):
    """Sizes of 1, which Triton specialises on, and sizes that fill no block."""
    assert compile_all(arch, "--case", "odd", "--dtype", "fp32", "fp16")
