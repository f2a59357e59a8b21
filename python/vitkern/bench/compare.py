# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench compare`: whether B takes longer than A, row by row."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitkern.bench import store
from vitkern.bench.environment import in_words, machine, software
from vitkern.bench.verdicts import Factor, factor_by_anchor, moved
from vitkern.commands.errors import CommandError
from vitkern.commands.texts import readable


@dataclass(frozen=True)
class Compared:
    """A row of both files with milliseconds of each, or the reason why it has no verdict."""

    key: tuple[Any, ...]
    verdict: str
    milliseconds: tuple[float, float] | None = None
    factor: Factor | None = None

    @property
    def is_worse(self) -> bool:
        return self.verdict == "slower" or self.verdict.startswith("FAILED in B")

    def line(self) -> str:
        text = store.in_words(self.key)
        if self.factor is None or self.milliseconds is None:
            return f"{text}  {self.verdict}"
        times = "".join(f"{time:>10.3f}" for time in self.milliseconds)
        interval = f"{self.factor.middle:.3f} [{self.factor.low:.3f}, {self.factor.high:.3f}]"
        return f"{text}{times}{interval:>25}  {self.verdict}"


HEADING = f"{store.HEADING}{'A ms':>10}{'B ms':>10}{'B / A':>25}  verdict"


def compare_files(a: Path, b: Path, *, smallest: float, anyway: bool = False) -> list[Compared]:
    """Prints and returns the verdicts on two files of `run --json`."""
    records = store.read(a), store.read(b)
    _same_machine(records, anyway)
    compared = compare_records(*records, smallest=smallest)
    if all(row.verdict.startswith("only in") for row in compared):
        raise CommandError(f"{a} and {b} have no row in common, so there is nothing to compare")
    for name, record in zip("AB", records):
        unfinished = "" if record["status"] == "complete" else f" ({record['status']})"
        print(readable(f"{name}: {in_words(record['environment'])}{unfinished}"))
    print(HEADING)
    for row in compared:
        print(readable(row.line()))
    print(summary(compared))
    return compared


def _same_machine(records: tuple[store.Record, store.Record], anyway: bool) -> None:
    environments = [record["environment"] for record in records]
    devices = {row["device"] for record in records for row in record["rows"]}
    for device in sorted(devices):
        machines = [", ".join(machine(environment, device)) or "no GPU" for environment in environments]
        if machines[0] != machines[1] and not anyway:
            raise CommandError(
                f"A was measured on {machines[0]}, B on {machines[1]}: anchors cannot correct for that "
                "(--anyway compares them regardless)"
            )
        if machines[0] != machines[1]:
            _warn(f"different machines, {' and '.join(machines)}")
    first, second = map(software, environments)
    for name, text in first.items():
        if text != second[name]:
            _warn(f"different {name}, {text} and {second[name]}; the anchor may differ too")


def _warn(text: str) -> None:
    print(readable(f"warning: {text}"), file=sys.stderr)


def compare_records(a: store.Record, b: store.Record, *, smallest: float) -> list[Compared]:
    """All rows of A in their order, then those that only B has."""
    rows_of_a, rows_of_b = ({store.key(row): row for row in record["rows"]} for record in (a, b))
    compared = []
    for key, row in rows_of_a.items():
        other = rows_of_b.get(key)
        compared.append(Compared(key, "only in A") if other is None else _compared(key, row, other, smallest))
    return compared + [Compared(key, "only in B") for key in rows_of_b if key not in rows_of_a]


def _compared(key: tuple[Any, ...], a: store.Row, b: store.Row, smallest: float) -> Compared:
    if not b["verified"]:
        return Compared(key, f"FAILED in B: {b['reason']}")
    if not a["verified"]:
        return Compared(key, f"FAILED in A: {a['reason']}")
    visits = [
        [list(zip(*of_visit)) for of_visit in zip(row["anchor_ms"], row["samples_ms"])] for row in (a, b)
    ]
    factor = factor_by_anchor(*visits)
    times = store.milliseconds(a), store.milliseconds(b)
    return Compared(key, factor.verdict(smallest, moved(store.megahertz(a, b))), times, factor)


def summary(compared: Iterable[Compared]) -> str:
    """The number of rows with each verdict."""
    verdicts = [row.verdict.partition(":")[0] for row in compared]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "no rows"
