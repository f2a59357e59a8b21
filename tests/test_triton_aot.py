# SPDX-License-Identifier: Apache-2.0
"""The machine code of the Triton kernels, compiled without a card: registers, spills and widths of accesses.

Registers limit the threads that hide the latency of the gathers, and narrow accesses need more requests. The limits
are Triton 3.9's figures, rounded up; other versions only have to compile the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.static import compilers
from benchmarks.static.figures import MULTIPROCESSORS
from tests.helpers import of_cards

if reason := compilers.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

CASES = ("fp32x32", "fp16x32", "bf16x64", "fp32x30")


def registers_allowed(kernel: str, arch: int, full: bool, fused: bool) -> int:
    if kernel == "forward":
        return 64 if full else 128 if fused else 96
    if kernel == "backward" and arch == 80:
        return 255 if fused else 160  # sm_80 has no vector atomics
    if kernel == "backward":
        # From boxes in 16 bits: 99 on sm_100, the price of locating each point once instead of twice.
        return 104 if full and fused else 96 if full else 144 if fused else 128
    return 72


@pytest.fixture(scope="module", params=of_cards(MULTIPROCESSORS, "triton"), ids=lambda arch: f"sm_{arch}")
def figures(request) -> list[dict]:
    # Another process: tests run with TRITON_INTERPRET, which leaves no compiler.
    command = [sys.executable, "-m", "benchmarks.static", "--json", "--backend", "triton", "--case", *CASES]
    command += ["--arch", str(request.param)]
    done = subprocess.run(command, cwd=compilers.ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(figures, kernel):
    """The rows of a kernel, except those with channels that do not fill their block."""
    return [row for row in figures if row["kernel"] == kernel and not row["case"].endswith("x30")]


def test_every_kernel_fits_its_registers_without_spilling_in_a_loop(figures):
    for row in figures:
        full = not row["case"].endswith("x30")
        fused = row["form"] != "plain"
        assert row["registers"] <= registers_allowed(row["kernel"], row["arch"], full, fused), row
        # Two registers are put aside across the loops, once; in the fused backward, what a run or the softmax needs.
        assert row["stack"] <= (32 if fused and row["kernel"] == "backward" else 8), row
        assert row["shared"] <= 4096, row


def test_corners_are_read_in_16_byte_loads(figures):
    for row in of(figures, "forward"):
        assert row["loads"]["16"] == 4, row
        assert row["stores"]["16"] == 1, row


def test_backward_reads_as_wide_as_it_adds(figures):
    for row in of(figures, "backward"):
        assert row["loads"]["16" if row["case"].startswith("fp32") else "8"] >= 5, (
            row
        )  # four corners and grad_output


def test_gradients_of_value_are_added_four_at_a_time_where_the_card_can(figures):
    for row in of(figures, "backward"):
        if row["arch"] >= 90:
            assert row["reductions"] == {"REDG.ADD.F32x4": 4}, row


def test_the_fused_forward_locates_a_point_once(figures):
    """Located once for each of two layouts, a point would take half as many instructions again as in the plain form."""
    rows = {(row["case"], row["form"]): row["located"] for row in of(figures, "forward")}
    for (case, form), located in rows.items():
        assert located <= 1.2 * rows[case, "plain"], (case, form)
