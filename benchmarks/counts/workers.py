# SPDX-License-Identifier: Apache-2.0
"""Counts cases in processes of their own, which import this module: they cannot import __main__."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.counts import baseline, cases, counter, record
from benchmarks.counts.cases import Case


def _count(number: int) -> tuple[str, record.Row, float]:
    """Counts the case with this index in everything(); the cases themselves cannot be pickled."""
    case, began = everything()[number], time.monotonic()
    counted = case.run() if case.small else case.run(EVERY=cases.EVERY)
    return case.name, record.of_case(case, counted), time.monotonic() - began


def everything() -> list[Case]:
    return cases.full() + cases.small()


def count(ops: list[str], workers: int) -> dict[str, record.Row]:
    """The counts of all cases of some ops, by name."""
    os.environ["VITKERN_EMULATED_COUNTS"] = str(counter.path())
    os.environ["VITKERN_BASELINE_COUNTS"] = str(baseline.path())
    numbers = [number for number, case in enumerate(everything()) if case.op in ops]
    found = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name, row, seconds in pool.map(_count, numbers):
            print(f"{seconds:>6.1f} s  {name}", flush=True)
            found[name] = row
    return found
