# SPDX-License-Identifier: Apache-2.0
"""The file of a run: written after every group of rows, so that whatever ends a run, what was measured is there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from vitkern.commands.errors import CommandError

SCHEMA = 1
STATUSES = ("running", "interrupted", "complete")
Row = dict[str, Any]
Record = dict[str, Any]
KEY = ("op", "case", "batch", "device", "dtype", "pass", "backend")
_FIELDS = {"schema", "status", "started", "seconds", "command", "environment", "ceilings", "anchors", "rows"}
_ROW_FIELDS = {*KEY, "verified", "errors", "reason"}
_FIGURES = {
    *("samples_ms", "anchor", "anchor_ms", "ms", "peak_bytes"),
    *("bytes", "flops", "gb_per_s", "gflop_per_s", "limit_ms", "share", "bound"),
}


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows of two files the same measurement."""
    return tuple(row[name] for name in KEY)


def milliseconds(row: Row) -> float:
    """The figure that stands for a row: on a CPU the least, which neighbours can only add to; on a GPU the median."""
    return float(row["ms"]["min" if row["device"] == "cpu" else "p50"])


HEADING = f"{'op':<22}{'case':<22}{'dtype':<6}{'pass':<9}{'backend':<13}"  # of in_words


def in_words(key: tuple[Any, ...]) -> str:
    op, case, batch, device, dtype, what, backend = key
    return f"{op:<22}{f'{case} x{batch}':<22}{short(dtype):<6}{what:<9}{device + '/' + backend:<13}"


def short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def write(path: Path, record: Record) -> None:
    """In one step: a reader, or a kill in the middle, never meets half a file."""
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(_text(_finite(record)) + "\n")
        os.replace(beside, path)
    except OSError as error:
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
    objection = complaint(record)
    if objection is not None:
        raise CommandError(f"{path} is no file of `vitkern bench run --json`: {objection}")
    return dict(record)


def complaint(record: Any) -> str | None:
    """None where the record keeps to the schema, else what is wrong with it."""
    if not isinstance(record, dict) or "schema" not in record:
        return "it does not say its schema"
    if record["schema"] != SCHEMA:
        return f"its schema is {record['schema']}, this vitkern knows {SCHEMA}"
    missing = _FIELDS - set(record)
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    if record["status"] not in STATUSES:
        return f"its status is {record['status']!r}"
    for row in record["rows"]:
        objection = _complaint_about(row)
        if objection is not None:
            return f"row {row.get('op')} {row.get('case')}: {objection}"
    return None


def _complaint_about(row: Row) -> str | None:
    missing = (_ROW_FIELDS | (_FIGURES if row.get("verified") else set())) - set(row)
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    if not row["verified"] and (_FIGURES & set(row) or not row["reason"]):
        return "it was not verified, so it must have a reason and no figures"
    if row["verified"] and list(map(len, row["samples_ms"])) != list(map(len, row["anchor_ms"])):
        return "each sample needs one of the anchor"
    return None
