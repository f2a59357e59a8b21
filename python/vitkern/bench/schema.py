# SPDX-License-Identifier: Apache-2.0
"""The schema of a results file: every field that a report or a comparison reads, type by type.

Readers of a valid record need no checks of their own: names are printable, and numbers are finite, as are their
quotients and logarithms.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

SCHEMA = 1
STATUSES = ("running", "interrupted", "complete")
KEY = ("op", "case", "batch", "device", "dtype", "pass", "backend")
GREATEST = 1e30

Check = Callable[[Any], bool]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    # A comparison with NaN is false; one of a number of a thousand digits with a float is exact.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= GREATEST


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value >= 1 / GREATEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_anything(value: Any) -> bool:
    return True


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _some(check: Check) -> Check:
    return lambda value: bool(value) and check(value)


def _table_of(check: Check, is_key: Check = _is_name) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(map(is_key, value)) and all(map(check, value.values()))
    )


def _is_size(value: Any) -> bool:
    """Whether it is a number of bytes, which is a name in JSON."""
    return _is_name(value) and value.isascii() and value.isdigit() and len(value) < 20


_times = _some(_list_of(_some(_list_of(_is_positive))))  # [visits][rounds]

_RECORD: dict[str, Check] = {
    "schema": _is_anything,
    "status": STATUSES.__contains__,
    "started": _is_text,
    "seconds": _is_number,
    "command": _list_of(_is_text),
    "environment": _is_anything,
    "ceilings": _is_anything,
    "anchors": _is_anything,
    "rows": _list_of(_is_anything),
}
_ENVIRONMENT: dict[str, dict[str, Check]] = {
    "cpu": {"model": _is_text, "logical_cores": _maybe(_is_count)},
    "cuda": {"devices": _list_of(_is_anything)},
    "torch": {"version": _is_text},
    "vitkern": {"version": _maybe(_is_text)},
}
_OF_CPU: dict[str, Check] = {
    "threads": _maybe(_is_count),
    "chosen": _maybe(_is_text),
}  # optional fields
_DEVICE: dict[str, Check] = {"name": _is_text, "memory_gib": _is_number}
_COMMIT: dict[str, Check] = {"id": _is_text, "dirty": _is_flag}
_CEILINGS: dict[str, Check] = {
    "copy": _some(_table_of(_is_positive, _is_size)),
    "product": _some(_table_of(_is_positive)),
}
_ROW: dict[str, Check] = dict.fromkeys(KEY, _is_name) | {
    "batch": _is_count,
    "verified": _is_flag,
    "errors": _table_of(_maybe(_is_number)),
    "reason": _maybe(_is_text),
}
# The host's time, the card's clock, and whether the host was ahead of the card: in rows of a card only.
FIGURES_OF_CARDS: dict[str, Check] = {
    "host_ms": _times,
    "megahertz": _times,
    "ahead": _is_flag,
}
_FIGURES: dict[str, Check] = {
    "samples_ms": _times,
    "anchor_ms": _times,
    "anchor": _is_name,
    "ms": _table_of(_is_positive),
    "peak_bytes": _maybe(_is_number),
    "bound": _is_name,
    "bytes": _is_positive,
    "flops": _is_number,
    "gb_per_s": _is_number,
    "gflop_per_s": _is_number,
    "limit_ms": _is_positive,
    "share": _is_number,
}


def complaint(record: Any) -> str | None:
    """None if the record follows the schema, else a sentence on its fault."""
    if not isinstance(record, dict) or "schema" not in record:
        return "it does not say its schema"
    if record["schema"] != SCHEMA or isinstance(record["schema"], bool):
        return f"its schema is {_short(record['schema'])}, this vitkern knows {SCHEMA}"
    objection = _against("it", record, _RECORD) or _about_environment(record["environment"])
    if objection is None and record["ceilings"] is not None:
        objection = _against("its ceilings", record["ceilings"], _CEILINGS)
    if objection is not None:
        return objection
    for number, row in enumerate(record["rows"], 1):
        objection = _about_row(row)
        if objection is not None:
            return f"row {_name_of(row, number)}: {objection}"
    return None


def _short(value: Any) -> str:
    return reprlib.repr(value)  # of any depth and length


def _name_of(row: Any, number: int) -> str:
    if not isinstance(row, dict):
        return _short(row)
    op, case = row.get("op"), row.get("case")
    return f"{op} {case}" if _is_name(op) and _is_name(case) else f"number {number}"


def _against(what: str, part: Any, checks: dict[str, Check]) -> str | None:
    """None if `part` is an object that has all these fields and each passes its check."""
    if not isinstance(part, dict):
        return f"{what} is no object"
    missing = _listed(set(checks) - set(part))
    if missing:
        return f"{what} lacks {missing}"
    wrong = next((name for name, check in checks.items() if not check(part[name])), None)
    if wrong is None:
        return None
    its = "its" if what == "it" else f"{what}'s"
    return f"{its} {wrong} cannot be {_short(part[wrong])}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _about_environment(environment: Any) -> str | None:
    what = "its environment"
    objection = _against(what, environment, dict.fromkeys((*_ENVIRONMENT, "commit"), _is_anything))
    for name, checks in _ENVIRONMENT.items():
        objection = objection or _against(f"{what}'s {name}", environment[name], checks)
    if objection is None:
        objection = _against(f"{what}'s cpu", dict.fromkeys(_OF_CPU) | environment["cpu"], _OF_CPU)
    if objection is None and environment["commit"] is not None:
        objection = _against(f"{what}'s commit", environment["commit"], _COMMIT)
    if objection is None:
        found = (_against(f"{what}'s GPU", gpu, _DEVICE) for gpu in environment["cuda"]["devices"])
        objection = next(filter(None, found), None)
    return objection


def _about_row(row: Any) -> str | None:
    objection = _against("it", row, _ROW)
    if objection is not None:
        return objection
    if row["verified"]:
        of_card = {name: check for name, check in FIGURES_OF_CARDS.items() if name in row}
        return _against("it", row, _FIGURES | of_card) or _about_figures(row)
    if (set(_FIGURES) | set(FIGURES_OF_CARDS)) & set(row) or not row["reason"]:
        return "it was not verified, so it must have a reason and no figures"
    return None


def _about_figures(row: dict[str, Any]) -> str | None:
    missing = _listed({"min", "p50"} - set(row["ms"]))
    if missing:
        return f"its ms lacks {missing}"
    if not row["errors"] or None in row["errors"].values():
        return "it was verified, so it must have errors, all of them numbers"
    if list(map(len, row["samples_ms"])) != list(map(len, row["anchor_ms"])):
        return "it needs one sample of the anchor for each of its own"
    return None
