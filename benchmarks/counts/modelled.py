# SPDX-License-Identifier: Apache-2.0
"""The loads that L1 serves in a model of the card, for all blocks of the encoder, by distribution of the points."""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.counts import cases, counter, record
from vitkern.cases import ATTENTION_CASES

SHAPE = "detr-encoder"
MULTIPROCESSORS, RESIDENT, KILOBYTES = (
    132,
    4,
    192,
)  # of an H200; blocks at a time; the part of its memory that is L1
PLACES = cases.PLACES[:3]
DTYPES = ("fp32", "bf16")


def _measure(key: tuple[str, str]) -> dict[str, Any]:
    dtype, places = key
    shape = ATTENTION_CASES[SHAPE].with_batch(1)
    counted = cases.forward(shape, dtype, places, L1=f"{MULTIPROCESSORS}x{RESIDENT}x{KILOBYTES}")
    (launch,) = counted.launches
    misses = {one["tensor"]: one for one in launch["l1"]}
    value = misses["value"]
    stored = sum(one["sectors"] for one in launch["global"] if one["what"] == "store")
    return {
        "dtype": dtype,
        "places": places,
        "missed": round(value["together"] / value["sectors"], 4),
        "missed_one_by_one": round(value["one by one"] / value["sectors"], 4),
        "value_bytes": 32 * value["together"],
        "read_bytes": 32 * sum(one["together"] for one in launch["l1"]),
        "written_bytes": 32 * stored,
        "all_blocks": record.row_of(counter.with_lines([launch])[0]) if key == ("fp32", "initial") else None,
    }


def measure(workers: int) -> list[dict[str, Any]]:
    keys = [(dtype, places) for dtype in DTYPES for places in PLACES]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(functools.partial(_measure), keys))
