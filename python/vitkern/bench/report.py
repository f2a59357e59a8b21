# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench report`: a run as a self-contained page, and as Markdown with pictures beside it."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vitkern.bench import plots, store, style
from vitkern.bench.environment import in_words
from vitkern.bench.run import advice, faster_in_words, of_card_in_words, speedup
from vitkern.bench.svg import Canvas
from vitkern.commands.errors import CommandError
from vitkern.commands.texts import in_html, in_markdown

COLUMNS = (
    *("op", "case", "dtype", "pass", "backend", "{figure} ms", "over torch"),
    *("of the limit", "bound by", "GB/s", "GFLOP/s", "peak MB", "error / largest"),
)
HOW = (
    "Times are {figure}; backends and plain torch took turns in one process. Every row was checked against the "
    "formula in float64 before it was timed. The limit is the longer of two times: inputs and results moved once at "
    "the rate of a copy of that size, and the op's operations at the rate of a matrix product, both measured in this "
    "run. Gathers touch each pixel many times, so they stay far below it. 16-bit products may be made in float32 where "
    "that is faster, so marks may lie above the 16-bit line."
)
COLUMNS_OF_CARDS = ("host ms", "MHz")
OF_CARDS = (
    "Host ms: until the call returned, which the other time does not hold; with ! it does, as the card waited for the "
    "host. MHz: the card's clock. A speed-up that the clock alone may have made is ambiguous."
)


def write_reports(path: Path, output: Path | None) -> list[Path]:
    """Writes the report and returns the files."""
    record = store.read(path)
    outputs = [output] if output else [path.with_suffix(".html"), path.with_suffix(".md")]
    written = []
    for target in outputs:
        if target.suffix not in (".html", ".md"):
            raise CommandError(f"-o takes a name that ends in .html or .md, got {target}")
        try:
            _write(target, record)
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error}") from None
        written.append(target)
    return written


def _write(target: Path, record: store.Record) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".html":
        target.write_text(page(record), encoding="utf-8")
        return
    drawn = pictures(record)
    for name, picture in drawn.items():
        beside = target.with_name(f"{target.stem}-{name}.svg")
        beside.write_text(picture.markup(style.SVG), encoding="utf-8")
    target.write_text(markdown(record, target.stem, drawn), encoding="utf-8")


def pictures(record: store.Record) -> dict[str, Canvas]:
    """All plots by name: speedup-1, speedup-2, ..., time-1, ..., roofline."""
    record = record | {"rows": steady(record["rows"])}
    rows = record["rows"]
    named = {
        f"{kind}-{count}": canvas
        for kind, found in (("speedup", plots.speedup_bars(rows)), ("time", plots.time_against_size(rows)))
        for count, canvas in enumerate(found, 1)
    }
    roof = plots.roofline(record)
    return named | ({"roofline": roof} if roof else {})


def steady(rows: Sequence[store.Row]) -> list[store.Row]:
    """The rows that other work did not hold up. Averages and plots use only these."""
    held_up = store.held_up(rows)
    return [row for row in rows if store.key(row) not in held_up]


def averages(rows: Sequence[store.Row]) -> dict[tuple[str, str], dict[str, float]]:
    """The geometric mean of the speed-ups of each op on each backend, by dtype."""
    rows = steady(rows)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        ratio = speedup(row, rows)
        if ratio is not None:
            by_dtype = found.setdefault((row["op"], row["backend"]), {})
            by_dtype.setdefault(store.short(row["dtype"]), []).append(ratio)
    return {
        what: {dtype: statistics.geometric_mean(ratios) for dtype, ratios in by_dtype.items()}
        for what, by_dtype in found.items()
    }


def cells(row: store.Row, rows: Sequence[store.Row], held_up: Collection[tuple[Any, ...]]) -> list[str]:
    """The cells of a row of the table; the arguments are those of run.line."""
    names = [
        row["op"],
        f"{row['case']} x{row['batch']}",
        store.short(row["dtype"]),
        row["pass"],
        row["backend"],
    ]
    if not row["verified"]:
        return [*names, f"FAILED: {row['reason']}"]
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    return [
        *names,
        f"{store.milliseconds(row):.3f}",
        faster_in_words(row, rows, held_up),
        f"{row['share']:.1%}",
        row["bound"],
        f"{row['gb_per_s']:.2f}",
        f"{row['gflop_per_s']:.2f}",
        peak,
        f"{max(row['errors'].values()):.0e}",
        *(of_card_in_words(row) if store.megahertz(row) else ()),
    ]


def facts(record: store.Record) -> list[str]:
    """The sentences at the head of a report."""
    told = [in_words(record["environment"]) + "."]
    if record["ceilings"]:
        copies = [
            f"{rate:.3g} GB/s at {int(size) / 2**20:.0f} MiB"
            for size, rate in record["ceilings"]["copy"].items()
        ]
        products = [
            f"{rate:.3g} GFLOP/s in {store.short(dtype)}"
            for dtype, rate in record["ceilings"]["product"].items()
        ]
        told.append(f"A copy runs at {', '.join(copies)}; a matrix product at {', '.join(products)}.")
    gpu = _figure(record["rows"]) == "median"
    told.append(
        HOW.format(figure="medians between events, the L2 cache flushed before each" if gpu else "minima")
    )
    if any(map(store.megahertz, record["rows"])):
        told.append(OF_CARDS)
    return told


def _figure(rows: Sequence[store.Row]) -> str:
    """The name of the figure that store.milliseconds takes."""
    return "median" if any(row["device"] == "cuda" for row in rows) else "least"


def columns(rows: Sequence[store.Row]) -> list[str]:
    names = [name.format(figure=_figure(rows)) for name in COLUMNS]
    return [*names, *COLUMNS_OF_CARDS] if any(map(store.megahertz, rows)) else names


def alarms(record: store.Record) -> list[str]:
    failed = sum(not row["verified"] for row in record["rows"])
    found = [f"{failed} rows FAILED their check and have no figures; the table says why."] if failed else []
    held_up = store.held_up(record["rows"])
    if held_up:
        found.append(f"{advice(held_up)}. No average and no plot is made of them.")
    if record["status"] != "complete":
        found.append(f"This run was not finished ({record['status']}): it lacks what came later.")
    return found


def page(record: store.Record) -> str:
    rows = record["rows"]
    told = "".join(f'<p class="muted">{in_html(text)}</p>' for text in facts(record))
    warned = "".join(f'<p class="alarm">{in_html(text)}</p>' for text in alarms(record))
    tiles = "".join(
        f'<div class="tile"><span>{in_html(op)}, {in_html(backend)}</span>'
        + "".join(f"<b>{ratio:.3g}x <small>{in_html(dtype)}</small></b>" for dtype, ratio in means.items())
        + "</div>"
        for (op, backend), means in averages(rows).items()
    )
    drawn = pictures(record)
    shown = {
        kind: "".join(f"<figure>{canvas.markup()}</figure>" for name, canvas in drawn.items() if kind in name)
        for kind in ("speedup", "time", "roofline")
    }
    backends = plots.distinct(rows, "backend")
    legends = {
        "speedup": _legend([name for name in backends if name != "torch"]),  # plain torch has no bars
        "time": _legend(backends),
    }
    sections = [
        (
            "How many times as fast as plain torch",
            "Full colour: forward; pale: backward, or both passes (a training step in one call).",
            "plots",
            "speedup",
        ),
        (
            "Time against size",
            "Filled marks and full lines: fp32; rings and dashes: 16 bits. Dotted: the limits.",
            "plots",
            "time",
        ),
        (
            "Roofline",
            "Circles: forward; diamonds: backward. Filled: fp32; rings: 16 bits.",
            "wide",
            "roofline",
        ),
    ]
    body = "".join(
        f'<h2>{title}</h2><p class="muted">{note}</p>{legends.get(kind, "")}'
        f'<div class="{look}">{shown[kind]}</div>'
        for title, note, look, kind in sections
        if shown[kind]
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>vitkern bench</title><style>{style.PAGE}</style></head><body><main>"
        f"<h1>vitkern bench</h1>{told}{warned}"
        f'<h2>Mean speed-up over plain torch</h2><div class="tiles">{tiles}</div>'
        f"{body}<h2>All rows</h2>{_table(rows)}"
        f"<footer>{in_html(record['started'])}, {record['seconds']:.0f} s: {in_html(' '.join(record['command']))}"
        "</footer></main></body></html>\n"
    )


def _legend(backends: Sequence[str]) -> str:
    names = {"torch": "plain torch"}
    entries = "".join(
        f'<span><i style="background:var(--{plots.colour_of_backend(backend)})"></i>'
        f"{in_html(names.get(backend, backend))}</span>"
        for backend in backends
    )
    return f'<div class="legend">{entries}</div>'


def _table(rows: Sequence[store.Row]) -> str:
    names = columns(rows)
    head = "".join(f"<th>{name}</th>" for name in names)
    lines, held_up = [], store.held_up(rows)
    for row in rows:
        texts = [in_html(text) for text in cells(row, rows, held_up)]
        *first, last = texts
        span = len(names) - len(first)
        end = f'<td class="words" colspan="{span}">{last}</td>' if span > 1 else f"<td>{last}</td>"
        plain = ' class="plain"' if row["backend"] == "torch" else ""
        lines.append(f"<tr{plain}>{''.join(f'<td>{text}</td>' for text in first)}{end}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def markdown(record: store.Record, stem: str, drawn: Mapping[str, Canvas]) -> str:
    rows = record["rows"]
    lines = ["# vitkern bench", ""]
    lines += [line for text in facts(record) for line in (in_markdown(text), "")]
    lines += [line for text in alarms(record) for line in (f"**{in_markdown(text)}**", "")]
    lines += ["| op | backend | dtype | mean speed-up over plain torch |", "|---|---|---|--:|"]
    lines += [
        _line_of_table(op, backend, dtype, f"{ratio:.2f}x")
        for (op, backend), means in averages(rows).items()
        for dtype, ratio in means.items()
    ]
    lines.append("")
    lines += [f"![{in_markdown(canvas.title)}]({quote(stem)}-{name}.svg)" for name, canvas in drawn.items()]
    names = columns(rows)
    numbers = "--:|" * (len(names) - 9)
    lines += ["", _line_of_table(*names), f"|---|---|---|---|---|--:|--:|--:|---|{numbers}"]
    held_up = store.held_up(rows)
    for row in rows:
        texts = cells(row, rows, held_up)
        lines.append(_line_of_table(*texts, *[""] * (len(names) - len(texts))))
    return "\n".join(lines) + "\n"


def _line_of_table(*texts: str) -> str:
    return f"| {' | '.join(map(in_markdown, texts))} |"
