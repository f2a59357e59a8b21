# SPDX-License-Identifier: Apache-2.0
"""Prints the figures as lines or as the table of docs/benchmarking.md, and compares them with their targets."""

from __future__ import annotations

from itertools import groupby

from benchmarks.static import compilers
from benchmarks.static.case import Case
from benchmarks.static.figures import Figures

PAGE = compilers.ROOT / "docs" / "benchmarking.md"
BEGIN, END = "<!-- static table: python -m benchmarks.static --markdown -->", "<!-- end of static table -->"
COMMITTED = ["fp32x32", "fp16x32"]
HEADINGS = (
    "kernel",
    "form",
    "dtype",
    "registers",
    "spilled B",
    "shared B",
    "occupancy",
    "loads",
    "stores",
    "reductions",
)
HEADINGS += ("loop", "+ locating", "whole")
NUMBERS = ("---",) * 3 + ("--:",) * 4 + ("---",) * 3 + ("--:",) * 3


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{number}x{width}B" for width, number in widths.items()) or "-"


def _cells(figures: Figures) -> tuple[str, ...]:
    counts = (figures.loop, figures.located, figures.whole)
    return (
        str(figures.registers),
        str(figures.stack),
        str(figures.shared),
        f"{figures.occupancy} %",
        _widths(figures.loads),
        _widths(figures.stores),
        " ".join(f"{number}x{name}" for name, number in figures.reductions.items()) or "-",
        *("-" if count is None else f"{count:.1f}" for count in counts),
    )


def one_line(figures: Figures) -> str:
    registers, stack, shared, occupancy, loads, _, reductions, *counts = _cells(figures)
    text = f"{registers:>4} regs {stack:>3} B spilled {shared:>6} B shared {occupancy:>5}"
    return f"{text}  {' / '.join(counts):>20} instructions  loads {loads}  {reductions}"


def _line(case: Case, figures: Figures) -> str:
    cells = (
        f"{case.op} {case.backend} {case.kernel}",
        case.form,
        f"{case.dtype}x{case.channels}",
        *_cells(figures),
    )
    return "| " + " | ".join(cells) + " |"


def missed(case: Case, arch: int, figures: Figures) -> list[str]:
    """Sentences on the targets that the figures of a kernel miss."""
    target, where = case.target, f"sm_{arch} {case.label}"
    if target is None or arch != 90:
        return []
    found = []
    if figures.stack:
        found.append(f"{where}: {figures.stack} bytes are spilled")
    if figures.occupancy < target.occupancy:
        found.append(f"{where}: occupancy {figures.occupancy} %, at least {target.occupancy} % are required")
    if max(figures.loads, default=0) < target.width:
        found.append(f"{where}: no load of {target.width} bytes")
    if target.instructions is not None and (figures.located or 1e9) > target.instructions:
        found.append(f"{where}: {figures.located} instructions, at most {target.instructions} are allowed")
    return found


def _committed() -> dict[str, dict[str, str]]:
    """The lines of the table in the page, by architecture and first three cells."""
    lines: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines():
        if line.startswith("### "):
            arch = lines.setdefault(line.removeprefix("### "), {})
        elif line.startswith("| ") and not line.startswith("| kernel"):
            arch["|".join(line.split("|")[:4])] = line
    return lines


def _measured(rows: dict[tuple[int, Case], Figures]) -> dict[str, dict[str, str]]:
    lines: dict[str, dict[str, str]] = {}
    for arch, group in groupby(rows.items(), key=lambda item: item[0][0]):
        made = (_line(case, figures) for (_, case), figures in group)
        lines[f"sm_{arch}"] = {"|".join(line.split("|")[:4]): line for line in made}
    return lines


def differences(rows: dict[tuple[int, Case], Figures]) -> list[str]:
    """The differences between lines of the page and the measured ones."""
    committed, found = _committed(), []
    for arch, lines in _measured(rows).items():
        for key, line in lines.items():
            before = committed.get(arch, {}).get(key)
            if before != line:
                found.append(f"{arch}: docs/benchmarking.md has\n  {before}\nmeasured was\n  {line}")
    return found


def write(rows: dict[tuple[int, Case], Figures]) -> None:
    """Replaces the measured lines of the table; the others stay."""
    table = _committed()
    for arch, lines in _measured(rows).items():
        table.setdefault(arch, {}).update(lines)
    text = [BEGIN, ""]
    for arch in sorted(table, key=lambda name: int(name.removeprefix("sm_"))):
        heading = ["| " + " | ".join(HEADINGS) + " |", "|" + "|".join(NUMBERS) + "|"]
        text += [f"### {arch}", "", *heading, *table[arch].values(), ""]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + "\n".join(text) + END + rest.split(END)[1])
