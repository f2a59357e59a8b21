# SPDX-License-Identifier: Apache-2.0
"""The file of a run: written after every group of rows, so that whatever ends a run, what was measured is there."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitkern.commands.errors import CommandError

SCHEMA = 1
STATUSES = ("running", "interrupted", "complete")
HELD_UP = 1.5  # times an anchor's best: threads and caches make tens of percent, others on the cores far more
Row = dict[str, Any]
Record = dict[str, Any]
KEY = ("op", "case", "batch", "device", "dtype", "pass", "backend")
_FIELDS = {"schema", "status", "started", "seconds", "command", "environment", "ceilings", "anchors", "rows"}
_ROW_FIELDS = {*KEY, "verified", "errors", "reason"}
_NUMBERS = ("bytes", "flops", "gb_per_s", "gflop_per_s", "limit_ms", "share")
_FIGURES = {"samples_ms", "anchor", "anchor_ms", "ms", "peak_bytes", "bound", *_NUMBERS}
# What is read of them; the rest is for people.
_ENVIRONMENT = {
    "cpu": ("model", "logical_cores"),
    "cuda": ("devices",),
    "torch": ("version",),
    "vitkern": ("version",),
}


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows of two files the same measurement."""
    return tuple(row[name] for name in KEY)


def milliseconds(row: Row) -> float:
    """The figure that stands for a row: on a CPU the least, which neighbours can only add to; on a GPU the median."""
    return float(row["ms"]["min" if row["device"] == "cpu" else "p50"])


def held_up(rows: Iterable[Row]) -> set[tuple[Any, ...]]:
    """Keys of the rows whose anchor took far longer than at its best in the same run: they did, too."""
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


def write(path: Path, record: Record) -> None:
    """In one step: a reader, or a kill in the middle, never meets half a file."""
    if os.path.isdir(path):  # an empty name is one, too
        raise CommandError(f"cannot write {path}: it is a folder")
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(_text(_finite(record)) + "\n")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise CommandError(f"cannot write {path}: {error}") from None


def _text(record: Record) -> str:
    """A row a line: files of thousands of them stay small, quick to write, and their differences can be read."""
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    head = json.dumps({**record, "rows": []}, indent=1)
    before, _, after = head.rpartition('"rows": []')
    return f'{before}"rows": [\n  {rows}\n ]{after}' if rows else head


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CommandError(f"{path} is no file of `vitkern bench run --json`: {error}") from None
    try:
        objection = complaint(record)
    except (AttributeError, KeyError, TypeError, ValueError):
        objection = "it is not built as one"
    if objection is not None:
        raise CommandError(f"{path} is no file of `vitkern bench run --json`: {objection}")
    return dict(record)


def complaint(record: Any) -> str | None:
    """None where the record keeps to the schema, else what is wrong with it."""
    if not isinstance(record, dict) or "schema" not in record:
        return "it does not say its schema"
    if record["schema"] != SCHEMA:
        return f"its schema is {record['schema']}, this vitkern knows {SCHEMA}"
    objection = _lack("it", record, _FIELDS) or _complaint_about_environment(record["environment"])
    if objection is not None:
        return objection
    if record["status"] not in STATUSES:
        return f"its status is {record['status']!r}"
    if not isinstance(record["rows"], list):
        return "its rows are no list"
    for row in record["rows"]:
        objection = _complaint_about(row)
        if objection is not None:
            where = f"row {row.get('op')} {row.get('case')}" if isinstance(row, dict) else f"row {row!r}"
            return f"{where}: {objection}"
    return None


def _lack(what: str, part: Any, names: Iterable[str]) -> str | None:
    """None where `part` is an object that has all these names."""
    if not isinstance(part, dict):
        return f"{what} is no object"
    missing = set(names) - set(part)
    return f"{what} lacks {', '.join(sorted(missing))}" if missing else None


def _complaint_about_environment(environment: Any) -> str | None:
    objection = _lack("its environment", environment, {*_ENVIRONMENT, "commit"})
    for name, names in _ENVIRONMENT.items():
        objection = objection or _lack(f"its environment's {name}", environment[name], names)
    if objection is None and environment["commit"] is not None:
        objection = _lack("its environment's commit", environment["commit"], ("id", "dirty"))
    return objection


def _complaint_about(row: Any) -> str | None:
    objection = _lack("it", row, _ROW_FIELDS)
    if objection is not None:
        return objection
    for name in KEY:
        if not isinstance(row[name], (str, int)):
            return f"its {name} is no name"
    if row["verified"]:
        return _lack("it", row, _FIGURES) or _complaint_about_figures(row)
    if _FIGURES & set(row) or not row["reason"]:
        return "it was not verified, so it must have a reason and no figures"
    return None


def _complaint_about_figures(row: Row) -> str | None:
    objection = _lack("its ms", row["ms"], ("min", "p50"))
    if objection is not None:
        return objection
    samples, of_anchor = row["samples_ms"], row["anchor_ms"]
    if not samples or not all(samples) or list(map(len, samples)) != list(map(len, of_anchor)):
        return "it needs samples, and one of the anchor for each"
    times = [time for visits in (samples, of_anchor) for visit in visits for time in visit]
    figures = [row[name] for name in _NUMBERS] + list(row["ms"].values()) + list(row["errors"].values())
    if not row["errors"] or not all(isinstance(figure, (int, float)) for figure in times + figures):
        return "its figures are no numbers"
    return None
