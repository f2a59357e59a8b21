# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for cards that are not here: what ptxas made of them is held in place.

Registers decide how many threads hide the latency of the gathers, and a narrow access costs its factor in requests.
The limits are what Triton 3.9 gives, rounded up; other versions compile, and only have to compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

import triton

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    pytest.skip(
        f"triton {triton.__version__} has another interface for compiling ahead", allow_module_level=True
    )

SCRIPT = Path(__file__).parent / "aot_compile.py"
ARCHES = (80, 90, 100, 120)


def registers_allowed(kernel: str, arch: int, full: bool, fused: bool) -> int:
    if kernel == "forward":
        return (80 if full else 128) if fused else (64 if full else 96)
    if kernel == "backward" and arch == 80:
        return 255 if fused else 160  # sm_80 has no vector atomics
    if kernel == "backward":
        return 96 if full else 144 if fused else 128
    return 72


@pytest.fixture(scope="module", params=ARCHES, ids=lambda arch: f"sm_{arch}")
def figures(request) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--arch", str(request.param)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_fits_its_registers_without_spilling_in_a_loop(figures):
    for row in figures:
        full = not row["case"].endswith("x30")
        fused = row["form"] != "plain"
        assert row["registers"] <= registers_allowed(row["kernel"], row["arch"], full, fused), row
        assert row["local"] == 0, row
        # Two registers are put aside across the loops, once; in the fused backward, what a run or the softmax needs.
        assert row["stack"] <= (32 if fused and row["kernel"] == "backward" else 8), row
        assert row["shared"] <= 4096, row


def test_corners_are_read_in_16_byte_loads(figures):
    for row in figures:
        if row["kernel"] == "forward" and not row["case"].endswith("x30"):
            logits = row["accesses"]["ld.global.v4.b32"] - 4
            assert logits in ((0,) if row["form"] == "plain" else (0, 1)), row
            assert row["accesses"]["st.global.v4.b32"] == 1, row


def test_backward_reads_as_wide_as_it_adds(figures):
    for row in figures:
        if row["kernel"] == "backward" and not row["case"].endswith("x30"):
            wide = "ld.global.v4.b32" if row["case"].startswith("fp32") else "ld.global.v2.b32"
            assert row["accesses"][wide] >= 5, row  # four corners and grad_output


def test_gradients_of_value_are_added_four_at_a_time_where_the_card_can(figures):
    for row in figures:
        if row["kernel"] == "backward" and row["arch"] >= 90 and not row["case"].endswith("x30"):
            assert row["accesses"]["red.global.gpu.relaxed.add.v4.f32"] == 4, row
