# SPDX-License-Identifier: Apache-2.0
"""The hot loops of ms_deform_attn in nvcc's machine code, beside the counts for one trip of the same loops."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.counts import cases, counter
from benchmarks.counts.counter import Row
from benchmarks.static import compilers, figures, ms_deform_attn
from benchmarks.static.case import Case
from benchmarks.static.sass import Kernel
from vitkern.cases import ATTENTION_CASES

ARCH = 90  # the emulator has its reductions of four floats
DTYPES = ("fp32", "bf16")
_OPCODES = {
    "loads": r"LDG(\.|$)",
    "stores": r"STG(\.|$)",
    "reductions": r"(RED|ATOM)G?\.",
    "shared loads": r"LDS(\.|$)",
    "shared stores": r"STS(\.|$)",
}
_KINDS = {"load": "loads", "store": "stores", "reduction": "reductions"}


@functools.cache
def _extent(file: Path, line: int) -> int:
    """The last line of the loop that begins at `line`."""
    depth, lines = 0, file.read_text().splitlines()
    for number, text in enumerate(lines[line - 1 :], line):
        code = text.split("//")[0]
        depth += code.count("{") - code.count("}")
        if depth == 0 and code.rstrip().endswith((";", "}")):
            return number
    return len(lines)


def _loop_of(site: Row, loops: dict[str, list[int]]) -> str | None:
    """The innermost loop around an access."""
    for frame in site["within"]:
        name, _, line = frame.rpartition(":")
        around = [
            loop
            for loop in loops
            if loop.startswith(f"{name}:")
            and int(loop.rpartition(":")[2]) <= int(line)
            and int(line) <= _extent(counter.CSRC / name, int(loop.rpartition(":")[2]))
        ]
        if around:
            return max(around, key=lambda loop: int(loop.rpartition(":")[2]))
    return None


def of_trip(launch: Row) -> tuple[str, dict[str, float]]:
    """The loop with most loads of 16 bytes, and the requests of a warp for each of its trips."""
    loads: dict[str, int] = {}
    inside: dict[str, list[Row]] = {}
    for site in launch["sites"]:
        if loop := _loop_of(site, launch["loops"]):
            inside.setdefault(loop, []).append(site)
            wide = site["what"] == "load" and not site["shared"] and site["bytes"] == 16
            loads[loop] = loads.get(loop, 0) + site["requests"] * wide
    hot = max(loads, key=lambda loop: loads[loop])
    found = dict.fromkeys(_OPCODES, 0.0)
    for site in inside[hot]:
        name = ("shared " if site["shared"] else "") + _KINDS[site["what"]]
        found[name] += site["requests"] / launch["loops"][hot][0]
    return hot, found


def of_machine_code(kernel: Kernel, case: Case) -> dict[str, float]:
    loop = figures.loop_over_points(kernel, case.points)
    assert loop is not None
    counts = {name: float(kernel.count(loop.blocks, opcode)) for name, opcode in _OPCODES.items()}
    return counts | {"instructions": kernel.longest_path(loop.blocks, loop.head, kernel.size)}


def counted(dtype: str, form: str) -> dict[str, tuple[str, dict[str, float]]]:
    """The requests of one trip, by kernel, if all points lie in the maps and all gradients are needed."""
    shape = replace(ATTENTION_CASES["detr-encoder"].shrunk(), name="small", heads=8, queries=16)
    found = cases.counted(functools.partial(cases.attention, shape, dtype, "one pixel", form))
    return {launch["kernel"]: of_trip(launch) for launch in counter.with_lines(found.launches)}


def measure() -> dict[str, Any]:
    """A row for each kernel; nothing if nvcc is not installed."""
    if compilers.nvcc() is None:
        return {}
    rows = []
    for dtype in DTYPES:
        wanted = [
            case
            for case in ms_deform_attn.cases(dtype, 32)
            if case.backend == "cuda" and case.kernel in ("forward", "backward")
        ]
        kernels = compilers.compile_cuda([case.source for case in wanted], ARCH)
        for case, kernel in zip(wanted, kernels):
            loop, trip = counted(dtype, case.form)[f"{case.op}_{case.kernel}"]
            code = of_machine_code(kernel, case)
            rows.append(
                {
                    "kernel": case.kernel,
                    "form": case.form,
                    "dtype": dtype,
                    "loop": loop,
                    "code": code,
                    "trip": trip,
                }
            )
    return {"nvcc": compilers.nvcc_version(), "arch": ARCH, "rows": rows}


def disagreements(found: dict[str, Any]) -> list[str]:
    return [
        f"{row['kernel']} {row['form']} {row['dtype']}: {row['code'][what]:g} {what} in the code, "
        f"{row['trip'][what]:g} counted"
        for row in found.get("rows", ())
        for what in _OPCODES
        if row["code"][what] != row["trip"][what]
    ]
