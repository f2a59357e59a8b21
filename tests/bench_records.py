# SPDX-License-Identifier: Apache-2.0
"""Records as `vitkern bench` writes them, made without measuring anything."""

from __future__ import annotations

from vitkern.bench.ceilings import ANCHORS
from vitkern.bench.schema import SCHEMA
from vitkern.bench.store import Record, Row
from vitkern.commands.doctor import examine


def row(
    case: str = "vt-64",
    *,
    op: str = "token_pool",
    backend: str = "cpu",
    dtype: str = "float32",
    what: str = "forward",
    slower: float = 1.0,
    anchor: float = 1.0,
    reason: str | None = None,
) -> Row:
    found: Row = {"op": op, "case": case, "batch": 1, "device": "cpu", "dtype": dtype, "pass": what}
    found |= {"backend": backend, "verified": reason is None, "errors": {"output": 1e-7}, "reason": reason}
    if reason is None:
        found |= {"samples_ms": [[slower] * 3] * 3, "anchor_ms": [[anchor] * 3] * 3, "anchor": "product"}
        found |= {"ms": dict.fromkeys(("min", "p20", "p50", "p80"), slower), "peak_bytes": 2**20}
        found |= {
            "bytes": 10**6,
            "flops": 10**7 * len(case),
            "gb_per_s": 1 / slower,
            "gflop_per_s": 10 / slower,
        }
        found |= {"limit_ms": 0.1, "share": 0.1 / slower, "bound": "memory"}
    return found


def record(*rows: Row, status: str = "complete", processor: str | None = None) -> Record:
    facts = examine() | {"commit": {"id": "0123456789abcdef", "dirty": False}, "gpu_clocks": []}
    if processor is not None:
        facts["cpu"] |= {"model": processor}
    return {
        "schema": SCHEMA,
        "status": status,
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "command": ["vitkern", "bench", "run"],
        "environment": facts,
        "ceilings": {
            "copy": {"1048576": 40.0, "268435456": 10.0},
            "product": {"float32": 100.0, "bfloat16": 2.0},
        },
        "anchors": ANCHORS,
        "rows": list(rows),
    }
