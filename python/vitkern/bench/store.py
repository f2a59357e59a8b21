# SPDX-License-Identifier: Apache-2.0
"""The file of a run. It is written after every group of rows, so a run that ends early loses no finished rows."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitkern.bench import schema
from vitkern.commands.errors import CommandError, in_one_line

_NONE = "not a file of `vitkern bench run --json`"
HELD_UP = 1.5  # times an anchor's best: threads and caches add tens of percent, other processes on the cores far more
Row = dict[str, Any]
Record = dict[str, Any]


def key(row: Row) -> tuple[Any, ...]:
    """The fields that identify a measurement: rows of two files with equal keys are the same measurement."""
    return tuple(row[name] for name in schema.KEY)


def milliseconds(row: Row) -> float:
    """The figure of a row: on a CPU the least, since other processes can only add to it; on a GPU the median."""
    return float(row["ms"]["min" if row["device"] == "cpu" else "p50"])


def megahertz(*rows: Row) -> list[float]:
    """The clocks of the card in all samples of these rows; none on a CPU."""
    return [clock for row in rows for visit in row.get("megahertz", ()) for clock in visit]


def held_up(rows: Iterable[Row]) -> set[tuple[Any, ...]]:
    """Keys of the rows whose anchor took far longer than its best in the same run: the rows took longer too."""
    least: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}  # of each row, by anchor
    for row in rows:
        if row["verified"]:
            by_key = least.setdefault((row["anchor"], row["device"]), {})
            by_key[key(row)] = min(map(min, row["anchor_ms"]))
    found: set[tuple[Any, ...]] = set()
    for by_key in least.values():
        most = HELD_UP * min(by_key.values())
        found |= {which for which, taken in by_key.items() if taken > most}
    return found


HEADING = f"{'op':<22}{'case':<22}{'dtype':<6}{'pass':<9}{'backend':<13}"  # of in_words


def in_words(key: tuple[Any, ...]) -> str:
    op, case, batch, device, dtype, what, backend = key
    return f"{op:<22}{f'{case} x{batch}':<22}{short(dtype):<6}{what:<9}{device + '/' + backend:<13}"


def short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


class File:
    """The file that a run writes its record to repeatedly."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: tuple[int, int] | None = None

    def write(self, record: Record) -> None:
        """Writes the record. A file that another run has put there since stays; this run then uses one beside it."""
        there = _identity(self.path)
        if self._written is not None and there is not None and there != self._written:
            own = self.path.with_name(f"{self.path.stem}-{os.getpid()}{self.path.suffix}")
            said = f"warning: something else has written {self.path} since this run began, which goes on in {own}"
            print(said, file=sys.stderr)
            self.path = own
        write(self.path, record)
        self._written = _identity(self.path)


def _identity(path: Path) -> tuple[int, int] | None:
    """The state of a file as it was put in place; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def write(path: Path, record: Record) -> None:
    """Writes in one step: a reader, or a kill in the middle, never meets half a file."""
    if os.path.isdir(path):  # the empty name is a folder too
        raise CommandError(f"cannot write {path}: it is a folder")
    # Other processes may write a file of this name at the same moment.
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(_text(_finite(record)) + "\n")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise CommandError(f"cannot write {path}: {error}") from None


def _text(record: Record) -> str:
    """The record with one row per line: files of thousands of rows stay small, fast to write, and readable in diffs."""
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    head = json.dumps({**record, "rows": []}, indent=1)
    before, _, after = head.rpartition('"rows": []')
    return f'{before}"rows": [\n  {rows}\n ]{after}' if rows else head


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except RecursionError:
        raise CommandError(f"{path} is {_NONE}: it is nested too deeply") from None
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # not text, not JSON, or a number without end
        raise CommandError(f"{path} is {_NONE}: {in_one_line(error)}") from None
    objection = schema.complaint(record)
    if objection is not None:
        raise CommandError(f"{path} is {_NONE}: {objection}")
    return dict(record)
