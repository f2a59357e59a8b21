# SPDX-License-Identifier: Apache-2.0
"""The committed counts, counts.json, and the sources that they belong to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.counts import cases, counter
from benchmarks.counts.cases import Case
from benchmarks.counts.counter import Counted, Row

ROOT = counter.emulated.ROOT
FILE = Path(__file__).with_name("counts.json")
OPS = ("ms_deform_attn", *cases.DENSE)
_ACCESS = ("what", "bytes", "tensor", "requests", "lanes", "sectors", "lines")
_SHARED = ("what", "bytes", "requests", "lanes", "least", "most")
_LAUNCH = (
    "kernel",
    "blocks",
    "counted",
    "threads",
    "shared_bytes",
    "waits",
    "barriers",
    "reductions",
    "loops",
)


def sources(op: str) -> list[Path]:
    """The files that an op's counts depend on: its kernels, what they share, the baseline."""
    files = [
        *(ROOT / "csrc" / op).glob("*.cuh"),
        ROOT / "csrc" / op / "cuda.cu",
        *(ROOT / "csrc/common").glob("*.cuh"),
    ]
    if op == "ms_deform_attn":
        files += [ROOT / "benchmarks/baseline_msda.cuh", ROOT / "benchmarks/counts/baseline.cu"]
    return sorted(files)


def digest(op: str) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources(op))).hexdigest()[:16]


def committed() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(found: dict[str, Any]) -> None:
    """Writes one line for each launch, so that a diff shows the changed counts."""
    FILE.write_text(_lines(found, 0) + "\n")


def _lines(value: Any, depth: int) -> str:
    if not isinstance(value, (dict, list)) or not value or _flat(value):
        return json.dumps(value)
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        inner = (f"{pad}{json.dumps(key)}: {_lines(one, depth + 1)}" for key, one in value.items())
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(pad + _lines(one, depth + 1) for one in value) + "\n" + " " * depth + "]"


def _flat(value: Any) -> bool:
    """Whether a value fits one line: a launch, or a part of one."""
    return (
        not isinstance(value, dict) and not any(isinstance(one, dict) for one in value)
    ) or "kernel" in value


def row_of(launch: Row) -> Row:
    row = {key: launch[key] for key in _LAUNCH}
    row["global"] = [[one[key] for key in _ACCESS] for one in launch["global"]]
    row["shared"] = [[one[key] for key in _SHARED] for one in launch["shared"]]
    return row


def of_case(case: Case, counted: Counted) -> Row:
    """The counts of a call; the deterministic form shares its forward pass with the plain one, which is left out."""
    launches = [
        one
        for one in counted.launches
        if case.form != "deterministic" or not one["kernel"].endswith("forward")
    ]
    rows = [row_of(one) for one in counter.with_lines(launches)]
    return {"filled": counted.filled, "workspace": counted.workspace, "launches": rows}
