# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: speed-up bars, time against size, a roofline. All scales are logarithmic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from vitkern.bench.run import speedup
from vitkern.bench.store import Record, Row, milliseconds, short
from vitkern.bench.svg import Canvas, Log, number

BACKEND_COLOURS = {"cpu": "c0", "cuda": "c2", "triton": "c1", "reference": "c3", "torch": "plain"}
COLOUR_OF_OTHERS = "c4"  # the mark's tooltip tells them apart
OP_COLOURS = ("c0", "c1", "c2", "c3", "c4")


def distinct(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def of(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """Verified rows with these fields; `what` stands for the pass."""
    wanted = {("pass" if name == "what" else name): value for name, value in wanted.items()}
    return [
        row for row in rows if row["verified"] and all(row[name] == value for name, value in wanted.items())
    ]


def colour_of_backend(backend: str) -> str:
    return BACKEND_COLOURS.get(backend, COLOUR_OF_OTHERS)


def colours_of_ops(rows: Sequence[Row]) -> dict[str, str]:
    return dict(zip(distinct(rows, "op"), itertools.cycle(OP_COLOURS)))


def says(row: Row) -> str:
    """The tooltip of a mark."""
    return (
        f"{row['op']} {row['case']} x{row['batch']}, {short(row['dtype'])}, {row['pass']}, {row['backend']}: "
        f"{milliseconds(row):.3g} ms, {row['share']:.0%} of the limit ({row['bound']})"
    )


def speedup_bars(rows: Sequence[Row]) -> list[Canvas]:
    """For each op and dtype, a bar for each case, backend and pass: the speed-up over plain torch."""
    ratios = {id(row): speedup(row, rows) for row in rows}
    known = [ratio for ratio in ratios.values() if ratio is not None]
    pictures = []
    for op in distinct(rows, "op"):
        for dtype in distinct(rows, "dtype"):
            bars = [row for row in of(rows, op=op, dtype=dtype) if ratios[id(row)] is not None]
            if bars:
                pictures.append(_speedup_panel(f"{op}, {short(dtype)}", bars, ratios, known))
    return pictures


def _speedup_panel(
    name: str, bars: Sequence[Row], ratios: dict[int, float | None], known: Sequence[float]
) -> Canvas:
    cases = distinct(bars, "case")
    height = 48 + len(cases) * 22 + len(bars) * 15
    canvas = Canvas(360, height, f"Speed-up over plain torch: {name}")
    canvas.text(0, 14, name, "head")
    scale = Log(min(0.8, *known) / 1.05, max(2.0, *known) * 1.1, 8, 300)
    for value in scale.ticks(7):
        canvas.line([(scale(value), 26), (scale(value), height - 18)], "grid")
        canvas.text(scale(value), height - 4, f"{number(value)}x", "tick", "middle")
    y = 26.0
    for case in cases:
        canvas.text(scale(1) + 3, y + 13, f"{case} x{bars[0]['batch']}", "tick")
        y += 18
        for row in (bar for bar in bars if bar["case"] == case):
            ratio = ratios[id(row)] or 1.0
            left, right = sorted((scale(1), scale(ratio)))
            look = colour_of_backend(row["backend"]) if ratio >= 1 else "bad"
            faint = "" if row["pass"] == "forward" else " faint"
            canvas.bar(left, y, right - left, 12, f"fill-{look}{faint}", says(row))
            canvas.text(right + 5, y + 10, f"{ratio:.3g}x")
            y += 15
        y += 4
    canvas.line([(scale(1), 24), (scale(1), height - 18)], "line-limit thin")
    return canvas


def time_against_size(rows: Sequence[Row]) -> list[Canvas]:
    """For each op and pass, a line over the cases by their operations for each backend and dtype, and the limit."""
    panels = [(op, what) for op in distinct(rows, "op") for what in distinct(rows, "pass")]
    return [_time_panel(op, what, found) for op, what in panels if (found := of(rows, op=op, what=what))]


def _time_panel(op: str, what: str, rows: Sequence[Row]) -> Canvas:
    canvas = Canvas(360, 270, f"Time against size: {op}, {what}")
    canvas.text(0, 14, f"{op}, {what}", "head")
    x = Log.over((row["flops"] for row in rows), 48, 350, 1.4)
    y = Log.over([value for row in rows for value in (milliseconds(row), row["limit_ms"])], 230, 46)
    canvas.axes(x, y, "operations", "ms")
    for dtype in distinct(rows, "dtype"):
        dashed = "" if dtype == "float32" else " dashed"
        for backend in distinct(rows, "backend"):
            line = sorted(of(rows, dtype=dtype, backend=backend), key=lambda row: row["flops"])
            if not line:
                continue
            look = colour_of_backend(backend)
            canvas.line([(x(row["flops"]), y(milliseconds(row))) for row in line], f"line-{look}{dashed}")
            for row in line:
                mark = "fill" if dtype == "float32" else "ring"
                canvas.mark(
                    "circle", x(row["flops"]), y(milliseconds(row)), f"{mark}-{look}", says(row), size=3.5
                )
        limits = sorted({(row["flops"], row["limit_ms"]) for row in of(rows, dtype=dtype)})
        canvas.line([(x(flops), y(least)) for flops, least in limits], "line-limit dotted")
    return canvas


def roofline(record: Record) -> Canvas | None:
    """Operations per second over operations per byte, below the limits of copies and products in the same run."""
    rows = of(record["rows"])
    shown = [row for row in rows if row["flops"] > 0 and row["gflop_per_s"] > 0]
    if not shown or not record["ceilings"]:
        return None
    products = record["ceilings"]["product"]
    copies = sorted((int(size), rate) for size, rate in record["ceilings"]["copy"].items())
    ours = set(distinct(rows, "backend")) & set(BACKEND_COLOURS) - {"torch"} or {"torch"}
    intensity = [row["flops"] / row["bytes"] for row in shown]
    colours = colours_of_ops(rows)
    canvas = Canvas(760, 470, "Roofline")
    x = Log(min(intensity) / 3, max(intensity) * 4, 52, 745)
    y = Log.over([*(row["gflop_per_s"] for row in shown), *products.values()], 400, 44, 1.9)
    canvas.axes(x, y, "operations / byte", "GFLOP/s")
    _roofs(canvas, x, y, copies, products)
    for row in shown:
        place = x(row["flops"] / row["bytes"]), y(row["gflop_per_s"])
        colour = colours[row["op"]] if row["backend"] in ours else "plain"
        mark = "fill" if row["dtype"] == "float32" else "ring"
        shape = "circle" if row["pass"] == "forward" else "diamond"
        canvas.mark(shape, *place, f"{mark}-{colour}", says(row), size=4.5 if row["backend"] in ours else 2.2)
    across = 8.0
    for op, colour in colours.items():
        canvas.mark("circle", across + 5, 456, f"fill-{colour}")
        canvas.text(across + 14, 460, op, "tick")
        across += 30 + 6.3 * len(op)
    canvas.mark("circle", across + 5, 456, "fill-plain", size=2.2)
    canvas.text(across + 14, 460, "plain torch, others", "tick")
    return canvas


def _roofs(
    canvas: Canvas, x: Log, y: Log, copies: Sequence[tuple[int, float]], products: dict[str, float]
) -> None:
    best = max(products.values())
    slopes = {copies[-1], max(copies, key=lambda copy: copy[1])}
    for size, rate in sorted(slopes, key=lambda slope: slope[1]):
        # From where the slope enters the plot to where it meets the highest roof.
        first, last = max(x.low, y.low / rate), min(x.high, best / rate)
        if first < last:
            left, right = (x(first), y(first * rate)), (x(last), y(last * rate))
            canvas.line([left, right], "line-limit")
            words = f"copy of {size / 2**20:.0f} MiB, {rate:.3g} GB/s"
            slope = math.degrees(math.atan2(right[1] - left[1], right[0] - left[0]))
            canvas.text(left[0] + 5, left[1] - 8, words, "tick", turned=slope)
    fastest = max(rate for _, rate in copies)
    for dtype, rate in products.items():
        start = max(x.low, rate / fastest)
        canvas.line([(x(start), y(rate)), (x.end, y(rate))], "line-limit")
        canvas.text(x.end, y(rate) - 6, f"product in {short(dtype)}, {rate:.3g} GFLOP/s", "tick", "end")
