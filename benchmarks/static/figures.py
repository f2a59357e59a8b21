# SPDX-License-Identifier: Apache-2.0
"""Computes the figures of the table from the SASS of a kernel. docs/benchmarking.md says how to read them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.static.case import Case, Points
from benchmarks.static.sass import Kernel, Loop


@dataclass(frozen=True)
class Multiprocessor:
    threads: int
    blocks: int
    shared: int  # KiB
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164),
    90: Multiprocessor(2048, 32, 228),
    100: Multiprocessor(2048, 32, 228),
    120: Multiprocessor(1536, 24, 100),
}


@dataclass(frozen=True)
class Figures:
    registers: int
    stack: int  # bytes of a thread
    shared: int  # bytes of a block
    occupancy: int  # percent
    loads: dict[int, int]  # bytes of an access: how many in the code
    stores: dict[int, int]
    reductions: dict[str, int]
    loop: float | None = None  # instructions of a point and channel: the loop over points
    located: float | None = None  # and what is done once for a round of points
    whole: float | None = None  # and once for a thread


def measure(kernel: Kernel, case: Case, arch: int) -> Figures:
    shared = kernel.shared + case.shared
    counts = _count(kernel, case.points) if case.points else (None, None, None)
    reductions = Counter(
        _reduction(i.opcode) for i in kernel.instructions if re.match(r"(RED|ATOM)G?\.", i.opcode)
    )
    return Figures(
        kernel.registers,
        kernel.stack,
        shared,
        occupancy(kernel.registers, shared, case.threads, arch),
        _widths(kernel, "LDG"),
        _widths(kernel, "STG"),
        dict(sorted(reductions.items())),
        *counts,
    )


def occupancy(registers: int, shared: int, threads: int, arch: int) -> int:
    """The percentage of a multiprocessor's threads that registers, shared memory and block slots allow."""
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    by_registers = sm.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = sm.shared * 1024 // (-(-(shared + 1024) // 128) * 128)  # 1 KiB of a block is the driver's
    blocks = min(by_registers, by_shared, sm.threads // (warps * 32), sm.blocks)
    return round(100 * blocks * warps * 32 / sm.threads)


def _widths(kernel: Kernel, opcode: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for found, number in kernel.opcodes(rf"{opcode}(\.|$)").items():
        bits = re.search(r"\.(?:[US])?(8|16|64|128|256)(?:\.|$)", found)
        widths[int(bits[1]) // 8 if bits else 4] += number
    return dict(sorted(widths.items(), reverse=True))


def _reduction(opcode: str) -> str:
    """The opcode without its modifiers: RED.E.ADD.F32.FTZ.RN.STRONG.GPU becomes RED.ADD.F32."""
    parts = [p for p in opcode.split(".") if p not in ("E", "FTZ", "RN", "STRONG", "GPU", "SYS")]
    return ".".join(parts)


def _count(kernel: Kernel, points: Points) -> tuple[float | None, ...]:
    """Instructions of a thread for each sampling point and channel: in the loop, with locating, and in all."""
    main = loop_over_points(kernel, points)
    if main is None:
        return None, None, None
    of_main = kernel.longest_path(main.blocks, main.head, kernel.size)
    a_point = of_main / (kernel.count(main.blocks, points.load) / points.loads)

    def outside(block: int) -> int:
        """The size of a block, or 0 for blocks of the loop over points and of the remainder of its unrolling."""
        left_over = main.blocks is not around and kernel.blocks[block].count(points.load)
        return 0 if block in main.blocks or left_over else kernel.size(block)

    enclosing = [loop for loop in kernel.loops if loop.blocks > main.blocks]
    around = min(enclosing, key=lambda loop: len(loop.blocks), default=None)
    a_round = 0
    if around is not None:
        a_round = kernel.longest_path(_without_loops(kernel, around, main), around.head, outside)
    once, per_round = _rest(kernel, main, points)
    located = a_point + a_round / points.round
    whole = located + per_round / points.round + once / points.total
    return tuple(round(figure / points.channels, 1) for figure in (a_point, located, whole))


def loop_over_points(kernel: Kernel, points: Points) -> Loop | None:
    """The innermost loop that loads whole points; of several, as for bilinear and nearest, the one with most loads."""
    found = []
    for loop in kernel.loops:
        loads = kernel.count(loop.blocks, points.load)
        inner = any(
            other.blocks < loop.blocks and kernel.count(other.blocks, points.load) for other in kernel.loops
        )
        if loads and loads % points.loads == 0 and not inner:
            found.append((loads, loop))
    return max(found, key=lambda pair: pair[0], default=(0, None))[1]


def _without_loops(kernel: Kernel, around: Loop, main: Loop) -> frozenset[int]:
    """The blocks of a loop without other loops inside it: a search for a level counts as not entered."""
    others = (o.blocks for o in kernel.loops if o.blocks < around.blocks and not o.blocks >= main.blocks)
    return around.blocks - frozenset().union(*others)


def _rest(kernel: Kernel, main: Loop, points: Points) -> tuple[int, int]:
    """Instructions outside of all loops, and those of the other loops over points."""
    outer = [one for one in kernel.loops if not any(one.blocks < other.blocks for other in kernel.loops)]
    barriers = [i.address for i in kernel.instructions if i.opcode.startswith("BAR.SYNC")]
    begun = min(barriers, default=0)  # before it a block loads its tables
    per_round = sum(
        kernel.longest_path(loop.blocks, loop.head, kernel.size)
        for loop in outer
        if loop.head > begun and not kernel.count(loop.blocks, points.load) and len(loop.blocks) > 0
    )
    looped = frozenset().union(*(loop.blocks for loop in outer))
    entry = next(iter(kernel.blocks))
    once = kernel.longest_path(
        frozenset(kernel.blocks), entry, lambda block: 0 if block in looped else kernel.size(block)
    )
    return once, per_round
