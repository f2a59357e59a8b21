# SPDX-License-Identifier: Apache-2.0
"""docs/counts.md: its prose is written by hand, its tables are drawn from counts.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.counts import cases, modelled, record
from benchmarks.counts.cases import Case
from benchmarks.counts.counter import Row

PAGE = record.ROOT / "docs" / "counts.md"
_MARKS = re.compile(r"<!-- counts: (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
Table = Iterator[str]


def scale(row: Row, count: float) -> float:
    """The count of all blocks, scaled from the counted blocks."""
    return count * row["blocks"] / row["counted"]


def short(number: float) -> str:
    """A number with three digits, such as 1.23M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.3g}"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(names: str, words: int) -> Table:
    """The heading of a table; `names` are divided by commas, and all columns except the first `words` hold numbers."""
    cells = names.split(", ")
    yield _line(cells)
    yield "|" + "|".join("---" if i < words else "--:" for i in range(len(cells))) + "|"


def total(row: Row, *kinds: str) -> list[int]:
    """Requests, lanes, sectors and lines of some kinds of access to global memory."""
    rows = [one[3:] for one in row["global"] if one[0] in kinds]
    return [sum(column) for column in zip(*rows)] if rows else [0] * 4


def _of(count: float, of: float) -> str:
    return f"{count / of:.3g}" if of else "-"


def _wavefronts(row: Row) -> str:
    requests, least, most = (sum(one[i] for one in row["shared"]) for i in (2, 4, 5))
    return f"{least / requests:.2f} to {most / requests:.2f}" if requests else "-"


def _main_loop(row: Row) -> tuple[str, float, float]:
    """The loop with most trips: its place, the trips of a warp, and the percentage of lanes that take part."""
    if not row["loops"]:
        return "-", 0, 0
    name, (trips, lanes) = max(row["loops"].items(), key=lambda loop: loop[1])
    warps = row["counted"] * -(-row["threads"] // 32)
    return name.rpartition("/")[2], trips / warps, 100 * lanes / trips / 32


EXACT = (
    "kernel, form, dtype, points, blocks, blocks a multiprocessor, loads, sectors a load, lines a load, stores, "
    "sectors a store, reductions, sectors a reduction, adds a sector, most, shared accesses, wavefronts an access, "
    "main loop, trips of a warp, lanes along, barriers of a block, waits"
)


def _exact_row(case: Case, row: Row) -> list[object]:
    loads, stores = total(row, "load", "copy from"), total(row, "store")
    added, sums = total(row, "reduction"), row["reductions"]
    loop, trips, along = _main_loop(row)
    requests = sum(one[2] for one in row["shared"])
    return [
        row["kernel"].removeprefix(f"{case.op}_"),
        case.form or "-",
        case.dtype,
        case.places or "-",
        row["blocks"],
        f"{row['blocks'] / modelled.MULTIPROCESSORS:.3g}",
        short(scale(row, loads[0])),
        _of(loads[2], loads[0]),
        _of(loads[3], loads[0]),
        short(scale(row, stores[0])),
        _of(stores[2], stores[0]),
        short(scale(row, added[0])) if added[0] else "-",
        _of(added[2], added[0]),
        short(sums["adds"] / sums["sectors"]) if sums["sectors"] else "-",
        short(sums["most"]) if sums["sectors"] else "-",
        short(scale(row, requests)) if requests else "-",
        _wavefronts(row),
        loop,
        f"{trips:.3g}" if trips else "-",
        f"{along:.0f} %" if trips else "-",
        f"{row['barriers'] / row['counted']:g}",
        row["waits"],
    ]


def _exact(known: dict[str, Any]) -> Table:
    shape = ""
    for case in cases.full():
        if f"{case.op}, {case.shape}" != shape:
            shape = f"{case.op}, {case.shape}"
            yield from ("", f"### {shape}", "", *_head(EXACT, 4))
        for row in known["counts"][case.name]["launches"]:
            yield _line(_exact_row(case, row))


def _memory(known: dict[str, Any]) -> Table:
    yield from _head("op, form, shape, dtype, launches, filled with zeros MB, workspace MB", 4)
    seen = set()
    for case in cases.full():
        key = (case.op, case.form or "-", case.shape, case.dtype)
        if key in seen:
            continue
        seen.add(key)
        found = known["counts"][case.name]
        yield _line(
            [*key, len(found["launches"]), *(f"{found[what] / 1e6:.2f}" for what in ("filled", "workspace"))]
        )


def _launch(known: dict[str, Any], form: str, shape: str, places: str, ending: str) -> Row:
    launches = known["counts"][f"ms_deform_attn {form} {shape} fp32 {places}"]["launches"]
    return next(one for one in launches if one["kernel"].endswith(ending))


def _beside(known: dict[str, Any]) -> Table:
    """Our counts and the baseline's for the encoder, in millions."""
    yield from _head("pass, points, counted, vitkern, baseline, baseline over vitkern", 3)
    columns: dict[str, Callable[[Row], float]] = {
        "requests to load": lambda row: total(row, "load")[0],
        "sectors loaded": lambda row: total(row, "load")[2],
        "requests to add": lambda row: total(row, "reduction")[0],
        "sectors added to": lambda row: total(row, "reduction")[2],
        "shared accesses": lambda row: sum(one[2] for one in row["shared"]),
        "barriers": lambda row: row["barriers"],
    }
    for which in ("forward", "backward"):
        for places in cases.PLACES:
            ours, theirs = (_launch(known, f, "detr-encoder", places, which) for f in ("plain", "baseline"))
            for name, count in columns.items():
                mine, other = scale(ours, count(ours)), scale(theirs, count(theirs))
                if mine or other:
                    yield _line([which, places, name, short(mine), short(other), _of(other, mine)])


def _code(known: dict[str, Any]) -> Table:
    found = known["machine code"]
    yield f"nvcc {found['nvcc']}, sm_{found['arch']}, 32 channels, all gradients; code = counted."
    yield ""
    names = list(found["rows"][0]["trip"])
    more = "instructions, trips at the encoder, instructions of the hot loop only"
    yield from _head(f"kernel, form, dtype, loop, {', '.join(names)}, {more}", 4)
    for row in found["rows"]:
        pairs = (f"{row['code'][name]:g} = {row['trip'][name]:g}" for name in names)
        name = f"ms_deform_attn {row['form']} detr-encoder {row['dtype']} initial"
        launches = known["counts"].get(name, {"launches": []})["launches"]
        trips = [
            scale(one, one["loops"][row["loop"]][0])
            for one in launches
            if one["kernel"].endswith(f"_{row['kernel']}")
        ]
        many = row["code"]["instructions"]
        of_loop = [short(trips[0]), short(trips[0] * many)] if trips else ["-", "-"]
        place = row["loop"].rpartition("/")[2]
        yield _line([row["kernel"], row["form"], row["dtype"], place, *pairs, f"{many:g}", *of_loop])


def _chains(known: dict[str, Any]) -> Table:
    yield from _head(
        "form, kernel, loads in a chain, each decides where the next is, waits at the encoder", 2
    )
    for form, kernels in known["chains"].items():
        for kernel, tensors in kernels.items():
            waits = _launch(known, form, "detr-encoder", "initial", kernel)["waits"]
            yield _line(
                [form, kernel.removeprefix("ms_deform_attn_"), len(tensors), " > ".join(tensors), waits]
            )


def left_after_merging(known: dict[str, Any], dtype: str, places: str) -> float:
    name = f"ms_deform_attn plain {modelled.SHAPE} {dtype} {places}"
    sums = known["counts"][name]["launches"][1]["reductions"]
    return sums["left"] / sums["adds"]


def _modelled(known: dict[str, Any]) -> Table:
    yield from _head(
        "dtype, points, L1 misses of value, if blocks begin one by one, MB of value from L2, MB of all loads from L2, "
        "MB stored, rows left after merging",
        2,
    )
    for row in known["modelled"]:
        megabytes = (f"{row[what] / 1e6:.0f}" for what in ("value_bytes", "read_bytes", "written_bytes"))
        left = left_after_merging(known, row["dtype"], row["places"])
        misses = (f"{row[what]:.3f}" for what in ("missed", "missed_one_by_one"))
        yield _line([row["dtype"], row["places"], *misses, *megabytes, f"{left:.2f}"])


def sampling_errors(known: dict[str, Any]) -> dict[str, float]:
    """Relative errors of counts scaled from every 16th block."""
    name = f"ms_deform_attn plain {modelled.SHAPE} fp32 initial"
    sample = known["counts"][name]["launches"][0]
    whole = next(row["all_blocks"] for row in known["modelled"] if row["all_blocks"])
    pairs = {
        **{
            what: (total(sample, "load")[i], total(whole, "load")[i])
            for i, what in enumerate(("loads", "", "sectors", "lines"))
        },
        "shared accesses": tuple(sum(one[2] for one in row["shared"]) for row in (sample, whole)),
        "wavefronts at most": tuple(sum(one[5] for one in row["shared"]) for row in (sample, whole)),
        "trips of the main loop": tuple(max(row["loops"].values())[0] for row in (sample, whole)),
    }
    del pairs[""]
    return {what: abs(scale(sample, some) / all_ - 1) for what, (some, all_) in pairs.items()}


def _sampling(known: dict[str, Any]) -> Table:
    yield from _head("count, off by", 1)
    for what, error in sampling_errors(known).items():
        yield _line([what, f"{100 * error:.2f} %"])


SECTIONS: dict[str, Callable[[dict[str, Any]], Table]] = {
    "sampling": _sampling,
    "beside": _beside,
    "exact": _exact,
    "memory": _memory,
    "chains": _chains,
    "code": _code,
    "modelled": _modelled,
}


def drawn(known: dict[str, Any]) -> str:
    def section(mark: re.Match[str]) -> str:
        name = mark[1]
        return (
            f"<!-- counts: {name} -->\n\n"
            + "\n".join(SECTIONS[name](known)).strip()
            + f"\n\n<!-- end of {name} -->"
        )

    return _MARKS.sub(section, PAGE.read_text())


def write(known: dict[str, Any]) -> None:
    PAGE.write_text(drawn(known))


def problems(known: dict[str, Any]) -> list[str]:
    """The reasons why the page does not match the current sources."""
    found = [
        f"the kernels of {op} have changed since they were counted: make counts"
        for op in record.OPS
        if known.get("sources", {}).get(op) != record.digest(op)
    ]
    if drawn(known) != PAGE.read_text():
        found.append("docs/counts.md is not what counts.json says: python -m benchmarks.counts --draw")
    return found
