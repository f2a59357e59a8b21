# SPDX-License-Identifier: Apache-2.0
"""From counts (docs/counts.md) and the rates of a card (rates.py) to the least time that a kernel can take.

For each resource it is the count over the rate, and the longest of these times is the kernel's bound: a kernel that
overlapped everything else with it would take as long. Kernels of a call follow each other, so their bounds add up.
Nothing here is a time without a card: the rates are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.counts import modelled, page
from benchmarks.counts.cases import Case
from benchmarks.counts.counter import Row
from benchmarks.gpu.rates import LANES, Card

SECTOR = 32
VECTOR = 16  # bytes of an add
RESOURCES = ("L1 loads", "L2 loads", "adds", "hottest row", "shared memory", "chain")
Rates = Mapping[str, float]
Known = Mapping[str, Any]  # counts.json
Times = dict[str, float]  # microseconds by resource


def of_launch(row: Row, rates: Rates, card: Card, *, chain: int = 1, from_l2: float = 0) -> Times:
    """`chain`: loads that wait for each other, of tensors that no L1 has yet. `from_l2`: bytes that a model of L1 says
    come from L2; asynchronous copies do in any case."""
    seconds: Times = {}
    _, _, loaded, _ = page.total(row, "load")
    _, _, copied, _ = page.total(row, "copy from")
    seconds["L1 loads"] = SECTOR * page.scale(row, loaded) / rates["rows from L1"]
    seconds["L2 loads"] = (SECTOR * page.scale(row, copied) + from_l2) / rates["rows from L2"]
    if card.capability >= (9, 0):  # the counts are of four floats at a time
        # By their bytes: whether half a sector takes as long as a whole one is not known.
        added = sum(lanes * width for kind, width, _, _, lanes, *_ in row["global"] if kind == "reduction")
        seconds["adds"] = page.scale(row, added) / VECTOR / rates["adds to random rows"]
        seconds["hottest row"] = _most_bytes(row) / SECTOR * LANES / rates["adds to one row"]
    wavefronts = page.scale(row, sum(access[4] for access in row["shared"]))
    seconds["shared memory"] = wavefronts / rates["wavefronts"] / card.multiprocessors
    seconds["chain"] = chain * rates["L2 latency"] / 1e9 if loaded or copied else 0.0
    return {resource: 1e6 * seconds.get(resource, 0.0) for resource in RESOURCES}


def _most_bytes(row: Row) -> float:
    """The bytes added to the sector that gets most: of the blocks that were counted, so at least these.

    Kernels add to whole rows, so the other sectors of its row get as many."""
    widths = [access[1] for access in row["global"] if access[0] == "reduction"]
    return row["reductions"]["most"] * min(widths) if widths else 0.0


def bound(times: Times) -> tuple[float, str]:
    resource = max(RESOURCES, key=lambda one: times[one])
    return times[resource], resource


def waiting(row: Row, rates: Rates) -> float:
    """Microseconds if each wait of a warp for loads took as long as L2 does. No bound: data may lie nearer."""
    return row["waits"] * rates["L2 latency"] / 1e3


def launches(known: Known, case: Case, what: str = "both") -> list[Row]:
    """The launches of a call in their order; "forward": of its first half."""
    found = known["counts"][case.name]["launches"]
    if case.form == "deterministic":  # its forward pass is the plain one's
        found = [*launches(known, replace(case, form="plain"), "forward"), *found]
    forward = [row for row in found if row["kernel"].endswith(("_forward", "_merge"))]
    return forward if what == "forward" else found


def times(known: Known, case: Case, row: Row, rates: Rates, card: Card) -> Times:
    """The times of a launch of a case, with its chain, and with the bytes that pass L1 where they are known."""
    chains = known["chains"].get(case.form, {}) or {}
    plain = known["chains"].get("plain", {})
    chain = len(chains.get(row["kernel"]) or plain.get(row["kernel"]) or ["one"])
    return of_launch(row, rates, card, chain=chain, from_l2=_from_l2(known, case, row, card))


def _from_l2(known: Known, case: Case, row: Row, card: Card) -> float:
    """The model is of a card with 132 multiprocessors, of the plain forward pass of one shape."""
    if card.multiprocessors != modelled.MULTIPROCESSORS or row["kernel"] != "ms_deform_attn_forward":
        return 0.0
    if (case.form, case.shape) not in {("plain", modelled.SHAPE), ("deterministic", modelled.SHAPE)}:
        return 0.0
    found = (
        one["read_bytes"]
        for one in known["modelled"]
        if (one["dtype"], one["places"]) == (case.dtype, case.places)
    )
    return next(found, 0.0)


def of_call(known: Known, case: Case, what: str, rates: Rates, card: Card) -> tuple[float, str]:
    """The bound of a call in microseconds, and the resource that makes most of it."""
    bounds = [bound(times(known, case, row, rates, card)) for row in launches(known, case, what)]
    shares = {name: sum(time for time, by in bounds if by == name) for name in RESOURCES}
    return sum(shares.values()), max(RESOURCES, key=lambda one: shares[one])


# ---- Tables

HEADINGS = (*RESOURCES, "bound µs", "by", "waits at L2")


def kernels_in_words(known: Known, wanted: Sequence[Case], rates: Rates, card: Card) -> list[str]:
    """A line for each kernel and case: microseconds by resource, the bound, and its name."""
    words = ("kernel", "form", "shape", "dtype", "points")
    lines = [
        f"| {' | '.join((*words, *HEADINGS))} |",
        "|---" * len(words) + "|--:" * len(RESOURCES) + "|--:|---|--:|",
    ]
    for case in wanted:
        for row in known["counts"][case.name]["launches"]:
            found = times(known, case, row, rates, card)
            least, by = bound(found)
            cells = [row["kernel"], case.form or "-", case.shape, case.dtype, case.places or "-"]
            cells += [short(found[resource]) for resource in RESOURCES]
            cells += [short(least), by, short(waiting(row, rates))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def short(microseconds: float) -> str:
    return f"{microseconds:.3g}" if microseconds else "-"
