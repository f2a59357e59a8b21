# SPDX-License-Identifier: Apache-2.0
"""PART=model: rates of the card, the bounds that counts make of them, and how long the calls took."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.counts import record
from benchmarks.counts.cases import Call, Case, full
from benchmarks.gpu import bounds, rates
from benchmarks.gpu.common import DONE, FAILED, LEFT, Budget, opened, show
from benchmarks.gpu.rates import RATES, Card, Rate
from benchmarks.gpu.resume import breaks_the_card
from vitkern.bench import store
from vitkern.bench.cuda_clock import CudaClock, Sample
from vitkern.bench.measure import interleaved
from vitkern.bench.verdicts import moved
from vitkern.check.examine import deterministic as deterministic_mode
from vitkern.commands.errors import CommandError

FOLDER = "model"
SECONDS = 1.0  # of a case's passes
ROUNDS = 20
STEADY = 1.03  # rates and times are of the same card if its clock moved by less
BELOW = 0.97  # a time that is less of its bound says that something is wrong


def subjects() -> list[Rate | Case]:
    """The rates first: without them no count is a time."""
    return [*RATES, *(case for case in full() if case.make)]


def passes(case: Case) -> tuple[str, ...]:
    return ("both",) if case.form == "deterministic" else ("forward", "both")


def listing(wanted: Sequence[Rate | Case]) -> None:
    for subject in wanted:
        if isinstance(subject, Rate):
            print(f"{subject.name:<24}{rates.unit_of(subject):<34}{subject.what}")
    print()
    known = record.committed()
    for subject in wanted:
        if isinstance(subject, Case):
            kernels = dict.fromkeys(row["kernel"] for row in bounds.launches(known, subject))
            print(f"{subject.name:<64}{' '.join(passes(subject)):<15}{' '.join(kernels)}")


def seconds_of_timing(wanted: Sequence[Rate | Case]) -> float:
    return SECONDS * len(wanted)


def run(wanted: Sequence[Rate | Case], path: Path, environment: Mapping[str, Any], budget: Budget) -> int:
    """Adds a row for each rate and case until all is there or the time is over."""
    bench = of_the_card()
    kept = opened(path, environment, card=dataclasses.asdict(bench.card))
    there = {row["key"][1] for row in kept["rows"]}
    left = [subject for subject in wanted if subject.name not in there]
    while left and budget.allows_more():
        print(f"{budget.left():>5.0f} s left  {left[0].name}", flush=True)
        kept["rows"].append(budget.timed(functools.partial(bench.row, left[0])))
        del left[0]
        store.write(path, kept)
        demand_a_whole_card(kept["rows"][-1])
    return told(kept, path, len(left))


def told(kept: Mapping[str, Any], path: Path, left: int) -> int:
    """Writes the tables; returns the exit status."""
    text = in_words(kept, record.committed())
    show(text, path, len(kept["rows"]), left)
    return FAILED if "FAILED" in text else LEFT if left else DONE


def demand_a_whole_card(row: Mapping[str, Any]) -> None:
    if breaks_the_card(row.get("reason", "")):
        raise CommandError(f"{row['key'][1]} left the card in no defined state: call again to go on after it")


class Model:
    """Measures a row. The library of kernels is built when a rate is wanted."""

    def __init__(self, card: Card, device: torch.device, clock: Callable[..., CudaClock] = CudaClock) -> None:
        self.card, self.device, self.clock = card, device, clock

    @functools.cached_property
    def kernels(self) -> rates.Kernels:
        stream = lambda: torch.cuda.current_stream(self.device).cuda_stream  # noqa: E731
        return rates.kernels_of(rates.built(self.card.capability), stream)

    def row(self, subject: Rate | Case) -> dict[str, Any]:
        kind = "rate" if isinstance(subject, Rate) else "call"
        try:
            found = self.rate(subject) if isinstance(subject, Rate) else self.call(subject)
        except CommandError:
            raise
        except Exception as error:  # of a launch or the card's memory: the others go on
            found = {"reason": f"raised {type(error).__name__}: {error}".splitlines()[0][:160]}
        return {"key": [kind, subject.name], **found}

    def rate(self, rate: Rate) -> dict[str, Any]:
        return rates.measure(rate, self.kernels, self.card, self.device, self.clock(self.device, flush=False))

    def call(self, case: Case) -> dict[str, Any]:
        """Milliseconds of the card and of the host for each pass, and the clock."""
        assert case.make is not None
        call = case.make(self.device.type)
        runs = {"forward": functools.partial(_forward, call), "both": call}
        more: dict[str, list[Sample]] = {}
        wanted = {what: runs[what] for what in passes(case)}
        interleaved(wanted, rounds=ROUNDS, seconds=SECONDS, clock=self.clock(self.device), more=more)
        return {what: _summary(samples) for what, samples in more.items()}


def of_the_card() -> Model:
    return Model(rates.card_of(torch.cuda.get_device_properties(0)), torch.device("cuda", 0))


def _forward(call: Call) -> None:
    with torch.no_grad(), deterministic_mode(call.deterministic):
        call.function(*call.inputs.values())


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "ms": statistics.median(one.device_ms for one in samples),
        "host_ms": statistics.median(one.host_ms for one in samples),
        "megahertz": [round(one.megahertz, 1) for one in samples],
        "ahead": all(one.ahead for one in samples),
    }


# ---- In words


def in_words(kept: Mapping[str, Any], known: bounds.Known) -> str:
    name = kept["environment"]["cuda"]["devices"][0]["name"]
    rows = {
        kind: {row["key"][1]: row for row in kept["rows"] if row["key"][0] == kind}
        for kind in ("rate", "call")
    }
    lines = [f"# Bounds on {name}", "", *_rates_in_words(rows["rate"])]
    found = {one: row["figure"] for one, row in rows["rate"].items() if "figure" in row}
    missing = [rate.name for rate in RATES if rate.name not in found]
    if missing:
        return "\n".join([*lines, "", f"No bounds: {', '.join(missing)} not measured."])
    card = Card(**kept["card"] | {"capability": tuple(kept["card"]["capability"])})
    clocks = [clock for row in rows["rate"].values() for clock in row["megahertz"]]
    lines += [
        "",
        "Microseconds at least, by resource:",
        "",
        *bounds.kernels_in_words(known, full(), found, card),
    ]
    lines += ["", "Calls, all their kernels one after the other, beside what was measured:", ""]
    lines += _calls_in_words(rows["call"], known, found, card, clocks)
    return "\n".join(lines)


def _rates_in_words(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| rate | figure | unit | MHz | of |", "|---|--:|---|--:|---|"]
    for rate in RATES:
        row = rows.get(rate.name)
        if row is None:
            continue
        if "reason" in row:
            lines.append(f"| {rate.name} | FAILED: {row['reason']} | {rates.unit_of(rate)} | | {rate.what} |")
            continue
        clock = statistics.median(row["megahertz"])
        lines.append(
            f"| {rate.name} | {row['figure']:.4g} | {rates.unit_of(rate)} | {clock:.0f} | {rate.what} |"
        )
    return lines


def _calls_in_words(
    rows: Mapping[str, Mapping[str, Any]],
    known: bounds.Known,
    found: bounds.Rates,
    card: Card,
    clocks: list[float],
) -> list[str]:
    lines = ["| call | pass | bound µs | mostly by | measured µs | host µs | times the bound | |"]
    lines.append("|---|---|--:|---|--:|--:|--:|---|")
    for case in full():
        row = rows.get(case.name, {})
        if "reason" in row:
            lines.append(f"| {case.name} | | | | FAILED: {row['reason']} | | | |")
        for what in passes(case):
            if what in row:
                least, by = bounds.of_call(known, case, what, found, card)
                taken, host = 1e3 * row[what]["ms"], 1e3 * row[what]["host_ms"]
                cells = [
                    case.name,
                    what,
                    f"{least:.3g}",
                    by,
                    f"{taken:.4g}",
                    f"{host:.3g}",
                    f"{taken / least:.2f}",
                ]
                lines.append(f"| {' | '.join(cells)} | {verdict(row[what], least, clocks)} |")
    return lines


def verdict(measured: Mapping[str, Any], least: float, clocks: Sequence[float]) -> str:
    """Empty where the time can be held against its bound and is not below."""
    factor = moved([*clocks, *measured["megahertz"]])
    if factor > STEADY:
        return f"ambiguous: clocks moved by {100 * (factor - 1):.0f} %"
    if not measured["ahead"]:
        return "ambiguous: the card waited for the host"
    return "FAILED: below its bound" if 1e3 * measured["ms"] < BELOW * least else ""
