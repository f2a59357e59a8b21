# SPDX-License-Identifier: Apache-2.0
"""The state of a pass, saved after each mutation, and its table."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.mutating.draw import Project, sites
from tools.mutating.mutation import Mutation
from tools.mutating.reach import write_json

LEFT_OUT = ("does not compile", "equivalent")
Row = dict[str, Any]


@dataclass
class State:
    """The rows of the mutations that have been tried, in the order of the draw."""

    path: Path
    rows: list[Row]

    @classmethod
    def load(cls, path: Path) -> State:
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else [])

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_json(self.path, self.rows)

    def kept(self) -> int:
        return sum(row["outcome"] not in LEFT_OUT for row in self.rows)


def identity(mutations: Iterable[Mutation]) -> str:
    """A hash of the mutations, and thus of the code around them."""
    text = json.dumps([asdict(mutation) for mutation in mutations])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_of(mutation: Mutation, text: str, outcome: str, **more: Any) -> Row:
    place = {"file": mutation.file, "line": mutation.line, "rule": mutation.rule, "key": mutation.key(text)}
    return {**place, "before": mutation.before, "after": mutation.after, "outcome": outcome, **more}


def again(project: Project, rows: Sequence[Row]) -> tuple[list[Mutation], list[Row]]:
    """The mutations of an earlier table that still exist in the code, and the rows of the others."""
    found, gone = [], []
    keys: dict[str, dict[str, Mutation]] = {}
    for row in rows:
        file = row["file"]
        if file not in keys:
            text = project.text(file) if (project.root / file).exists() else ""
            keys[file] = {mutation.key(text): mutation for mutation in sites(file, text)} if text else {}
        mutation = keys[file].get(row["key"])
        if mutation is None:
            gone.append(row)
        else:
            found.append(mutation)
    return found, gone


def reasons(path: Path) -> dict[str, str]:
    """The reasons why reviewed mutations survive, by key."""
    reviewed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {each["key"]: each["reason"] for each in reviewed}


def write(path: Path, seed: int, rows: Sequence[Row], reviewed: dict[str, str]) -> None:
    """Writes the table, with the reasons of survivors if known."""
    listed = [{**row, "reason": reviewed[row["key"]]} if row["key"] in reviewed else row for row in rows]
    write_json(path, {"seed": seed, "summary": summary(rows), "rows": listed})


def unexplained(rows: Sequence[Row], reviewed: dict[str, str]) -> list[Row]:
    return [row for row in rows if row["outcome"] == "survived" and row["key"] not in reviewed]


def lost(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """The rows of mutations that were caught earlier and survive now."""
    caught = {row["key"] for row in earlier if row["outcome"] == "caught"}
    return [row for row in rows if row["outcome"] == "survived" and row["key"] in caught]


def line_of(row: Row, reviewed: dict[str, str]) -> str:
    change = f"{_short(row['before'])} -> {_short(row['after'])}"
    outcome = row["outcome"]
    if outcome == "caught":
        outcome = f"caught by {row['by']} ({row['why']})" if row["why"] else f"caught by {row['by']}"
    elif row["key"] in reviewed:
        outcome = f"{outcome}: {reviewed[row['key']]}"
    elif row.get("why"):
        outcome = f"{outcome}: {row['why']}"
    seconds = f", {row['seconds']:.0f} s" if "seconds" in row else ""
    return f"{row['file']}:{row['line']}, {row['rule']}: {change}: {outcome}{seconds}"


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    files = len({row["file"] for row in rows})
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    return f"{len(rows)} mutations of {files} files: {told}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 50 else f"{line[:47]}...")
