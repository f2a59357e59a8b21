# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.static itself: it counts loops and paths right, and its options work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.static import __main__ as tool
from benchmarks.static import compilers, report, sass
from benchmarks.static.case import Points
from benchmarks.static.figures import _count, occupancy

# An outer loop over rounds of two points, with a branch of three instructions or one; in it a search loop that is not
# entered, and a loop of four instructions, two of them loads, over the points.
LISTING = """
 /*0000*/ MOV R0, RZ ;
 /*0010*/ ISETP.NE.AND P0, PT, R0, RZ, PT ;
 /*0020*/ @P0 BRA 0x60 ;
 /*0030*/ IADD3 R1, R1, 0x1, RZ ;
 /*0040*/ IADD3 R1, R1, 0x1, RZ ;
 /*0050*/ BRA 0x70 ;
 /*0060*/ MOV R1, RZ ;
 /*0070*/ @P2 BRA 0xa0 ;
 /*0080*/ IADD3 R3, R3, 0x1, RZ ;
 /*0090*/ @P3 BRA 0x80 ;
 /*00a0*/ LDG.E.128 R4, desc[UR4][R2.64] ;
 /*00b0*/ LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
 /*00c0*/ FFMA R4, R4, R8, R4 ;
 /*00d0*/ @P1 BRA 0xa0 ;
 /*00e0*/ @!P4 BRA 0x10 ;
 /*00f0*/ EXIT ;
 /*0100*/ BRA 0x100 ;
"""


def test_instructions_are_counted_along_the_longest_path():
    kernel = sass.Kernel("listing", instructions=sass._instructions(LISTING))
    assert [hex(loop.head) for loop in kernel.loops] == ["0x10", "0x80", "0xa0"]
    # A point: 4. A round of two points: 2 + 3 + 1 + 1. Once: MOV and EXIT, for four points. Two channels a thread.
    points = Points(r"LDG\.E\.128", loads=2, channels=2, round=2, total=4)
    assert _count(kernel, points) == (2.0, round((4 + 7 / 2) / 2, 1), round((4 + 7 / 2 + 2 / 4) / 2, 1))


def test_occupancy_is_what_the_scarcest_resource_allows():
    assert occupancy(64, 0, 256, 90) == 50
    assert occupancy(32, 0, 1024, 90) == 100
    assert occupancy(32, 100 << 10, 256, 90) == 25
    assert occupancy(32, 0, 32, 90) == 50  # 32 blocks of one warp
    assert occupancy(64, 0, 256, 120) == 67


def run(*arguments, path=None) -> subprocess.CompletedProcess:
    environment = {**os.environ, **({"PATH": path} if path else {})}
    command = [sys.executable, "-m", "benchmarks.static", "--arch", "90", "--kernel", *arguments]
    return subprocess.run(command, cwd=compilers.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_kernel_is_measured(backend):
    if reason := tool.why_not(backend):
        pytest.skip(reason)
    done = run(f"{backend} forward plain fp32x32")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"sm_90  ms_deform_attn {backend} forward plain fp32x32")
    assert " 0 B spilled" in line
    assert "4x16B" in line or "x16B" in line


def test_what_cannot_be_compiled_is_said(tmp_path):
    done = run("cuda forward plain", path=str(tmp_path))
    assert done.returncode == 1
    assert "cuda kernels are left out: nvcc was not found" in done.stderr


def test_the_page_holds_every_kernel_of_every_architecture():
    committed = report._committed()
    assert list(committed) == ["sm_80", "sm_90", "sm_100", "sm_120"]
    labels = {case.label for case in tool.all_cases(report.COMMITTED)}
    for lines in committed.values():
        cells = ([cell.strip() for cell in key.split("|")[1:]] for key in lines)
        assert {" ".join(three) for three in cells} == labels


def test_a_line_that_differs_and_a_target_that_is_missed_are_named():
    case = next(c for c in tool.all_cases(["fp32x32"]) if c.target and c.target.instructions)
    figures = tool.Figures(128, 8, 0, 25, {4: 1}, {}, {}, 20.0, 30.0, 40.0)
    words = "\n".join(report.missed(case, 90, figures) + report.differences({(90, case): figures}))
    for expected in (
        "8 bytes are spilled",
        "occupancy 25 %",
        "no load of 16 bytes",
        "30.0 instructions",
        "docs/benchmark",
    ):
        assert expected in words
    assert report.missed(case, 80, figures) == []
