# SPDX-License-Identifier: Apache-2.0
"""PART=counts: the counts of docs/counts.md, compared with the card's own counters (ncu, of Nsight Compute).

`python -m benchmarks.gpu.counts NAME` makes the call of a case once on the card; ncu runs it.
"""

from __future__ import annotations

import csv
import functools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.counts import page, record
from benchmarks.counts.cases import Case, full
from benchmarks.counts.counter import Row
from benchmarks.gpu.common import DONE, FAILED, LEFT, ROOT, Budget, show
from vitkern.bench import store
from vitkern.commands.errors import CommandError

FOLDER = "counts"
MOST = 0.02  # that a count may be off: most are of a sample of blocks
_GLOBAL = {"loads": ("ld", "load"), "stores": ("st", "store"), "reductions": ("red", "reduction")}
METRICS = {
    **{name: f"l1tex__t_requests_pipe_lsu_mem_global_op_{op}.sum" for name, (op, _) in _GLOBAL.items()},
    **{
        f"sectors of {name}": f"l1tex__t_sectors_pipe_lsu_mem_global_op_{op}.sum"
        for name, (op, _) in _GLOBAL.items()
    },
    "wavefronts of shared loads": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "wavefronts of shared stores": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",
}


def subjects() -> list[Case]:
    """The full shapes of our own kernels."""
    return [case for case in full() if case.make]


@functools.cache
def _committed() -> dict[str, Any]:
    return record.committed()["counts"]


def launches_of(case: Case) -> list[Row]:
    return _committed()[case.name]["launches"]


def command(case: Case) -> list[str]:
    kernels = "|".join(sorted({row["kernel"] for row in launches_of(case)}))
    options = ["--csv", "--print-units", "base", "--print-fp", "--kernel-name-base", "function"]
    options += ["--kernel-name", f"regex:^({kernels})$", "--metrics", ",".join(METRICS.values())]
    return ["ncu", *options, sys.executable, "-m", "benchmarks.gpu.counts", case.name]


def listing(wanted: Sequence[Case]) -> None:
    for case in wanted:
        print(shlex.join("python" if word == sys.executable else word for word in command(case)))


def seconds_of_timing(wanted: Sequence[Case]) -> float:
    """An estimate: ncu runs each launch once for each group of counters, and restores its memory in between."""
    return 15.0 * len(wanted)


def demand_counters() -> None:
    if shutil.which("ncu") is None:
        raise CommandError("PART=counts needs ncu of Nsight Compute in PATH")
    if torch.cuda.get_device_capability() < (9, 0):
        raise CommandError("the counts hold for sm_90 and later, which add four floats at a time")


# ---- What ncu says


def measured(text: str) -> list[dict[str, Any]]:
    """The launches of ncu's CSV in their order: the kernel, and each metric by its own name."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise CommandError(f"ncu counted nothing: {text.strip()[-400:] or 'it printed nothing'}")
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[begin:]):
        launch = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        launch[row["Metric Name"]] = (
            float(value) if value[:1].isdigit() else None
        )  # n/a: this card has no such
    return [found[number] for number in sorted(found, key=int)]


def expected(row: Row) -> Iterator[tuple[str, float, float]]:
    """The counts of a launch: name, least and most.

    ncu counts asynchronous copies separately, so launches with such copies have no counts of shared memory.
    """
    for name, (_, kind) in _GLOBAL.items():
        requests, _, sectors, _ = page.total(row, kind)
        for what, count in ((name, requests), (f"sectors of {name}", sectors)):
            yield what, page.scale(row, count), page.scale(row, count)
    if any(access[0] == "copy to" for access in row["shared"]):
        return
    for kind in ("load", "store"):
        sums = [(access[4], access[5]) for access in row["shared"] if access[0] == kind]
        least, most = (page.scale(row, sum(column)) for column in zip(*sums)) if sums else (0.0, 0.0)
        yield f"wavefronts of shared {kind}s", least, most


def off_by(value: float, least: float, most: float) -> float:
    """The distance of a value from the interval, relative to the value."""
    outside = max(least - value, value - most, 0.0)
    return outside / max(value, 1.0)


def compared(rows: Sequence[Row], launches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each launch and count that the card has."""
    kernels = [row["kernel"] for row in rows]
    ran = [launch["kernel"] for launch in launches if launch["kernel"] in kernels]
    if ran != kernels:
        raise CommandError(f"other kernels ran than were counted: {', '.join(ran)} for {', '.join(kernels)}")
    found = []
    for row, launch in zip(rows, (one for one in launches if one["kernel"] in kernels)):
        for what, least, most in expected(row):
            value = launch.get(METRICS[what])
            if value is not None:
                bounds = {"least": least, "most": most, "card": value, "off": off_by(value, least, most)}
                found.append({"kernel": row["kernel"], "what": what, **bounds})
    return found


def _counted(case: Case, seconds: float) -> dict[str, Any]:
    done = subprocess.run(command(case), cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0))
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise CommandError("this card's counters are for its administrator alone (ERR_NVGPUCTRPERM)")
    launches = measured(done.stdout)
    if case.form == "deterministic":  # its forward pass is the plain one's
        launches = [one for one in launches if not one["kernel"].endswith("_forward")]
    return {"key": [case.name], "counts": compared(launches_of(case), launches)}


def run(wanted: Sequence[Case], path: Path, environment: Mapping[str, object], budget: Budget) -> int:
    """Adds a row for each case until all are there or the time is over."""
    demand_counters()
    kept = json.loads(path.read_text()) if path.exists() else {"environment": environment, "rows": []}
    there = {row["key"][0] for row in kept["rows"]}
    left = [case for case in wanted if case.name not in there]
    while left and budget.allows_more():
        print(f"{budget.left():>5.0f} s left  {left[0].name}", flush=True)
        try:
            kept["rows"].append(budget.timed(functools.partial(_counted, left[0], budget.left())))
        except subprocess.TimeoutExpired:
            break
        del left[0]
        store.write(path, kept)
    show(in_words(kept["rows"]), path, len(kept["rows"]), len(left))
    wrong = any(one["off"] > MOST for row in kept["rows"] for one in row["counts"])
    return FAILED if wrong else LEFT if left else DONE


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the largest deviation of each kernel and count over all shapes."""
    worst: dict[tuple[str, str], tuple[float, str, Mapping[str, Any]]] = {}
    for row in rows:
        for one in row["counts"]:
            key = one["kernel"], one["what"]
            if key not in worst or one["off"] > worst[key][0]:
                worst[key] = one["off"], row["key"][0], one
    lines = ["| kernel | count | counted | on the card | off by | shape |", "|---|---|--:|--:|--:|---|"]
    for (kernel, what), (off, shape, one) in sorted(worst.items()):
        least, most = page.short(one["least"]), page.short(one["most"])
        counted = least if least == most else f"{least} to {most}"
        mark = " FAILED" if off > MOST else ""
        lines.append(
            f"| {kernel} | {what} | {counted} | {page.short(one['card'])} | {100 * off:.1f} %{mark} | {shape} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    (chosen,) = (case for case in subjects() if case.name == sys.argv[1])
    assert chosen.make is not None
    chosen.make("cuda")()
