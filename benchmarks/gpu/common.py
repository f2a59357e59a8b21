# SPDX-License-Identifier: Apache-2.0
"""Shared by all parts: the card, the commit, the time limit and the exit statuses."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitkern.bench.environment import environment as facts_of_the_machine
from vitkern.commands.errors import CommandError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STATE = ROOT / "build" / "gpu"
DONE, FAILED, REFUSED, LEFT = 0, 1, 2, 3  # exit statuses of the process
SECONDS = 540.0


class Budget:
    """The seconds that a run may take. A step begins only if the time left exceeds that of the longest step so far."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.end = seconds, clock, clock() + seconds
        self.longest = 0.0

    def left(self) -> float:
        return self.end - self.clock()

    def allows_more(self) -> bool:
        return self.left() > self.longest

    def timed(self, work: Callable[[], Any]) -> Any:
        began = self.clock()
        try:
            return work()
        finally:
            self.longest = max(self.longest, self.clock() - began)


def how_long(timing: float, limit: float) -> str:
    """A sentence on the time needed. `timing`: seconds for the measurements alone; `limit`: seconds of a call."""
    return (
        f"Timing may take {timing / 60:.0f} minutes; inputs, checks and compilation come on top. "
        f"Calls of {limit:.0f} s: {math.ceil(timing / limit)} or more."
    )


def demand_a_card() -> None:
    import torch

    if not torch.cuda.is_available():
        raise CommandError(
            "torch finds no usable GPU here (`vitkern doctor` says more); DRY=1 lists what would run on one"
        )


def environment(commit: str | None = None) -> dict[str, Any]:
    """The environment that vitkern bench records; the user names the commit if there is no repository."""
    found = facts_of_the_machine()
    if found["commit"] is None and commit:
        found["commit"] = {"id": commit, "dirty": False}
    return found


def demand_the_software_of(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuses to mix figures of different versions of torch, triton or vitkern in one file."""
    for what in ("torch", "triton", "vitkern"):
        old, new = before[what]["version"], now[what]["version"]
        if old != new:
            raise CommandError(f"{path} was begun with {what} {old}, this is {new}: FRESH=1 begins it anew")


def opened(path: Path, environment: Mapping[str, Any], **head: Any) -> dict[str, Any]:
    """The record of an earlier call, if it was made with the same software, or a new one."""
    if not path.exists():
        return {"environment": environment, **head, "rows": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    demand_the_software_of(record["environment"], environment, path)
    return record


def show(text: str, path: Path, rows: int, left: int) -> None:
    """Writes the tables of a record beside it, and prints them."""
    path.with_suffix(".md").parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n{path}: {rows} rows, {left} left")


def folder_of(environment: dict[str, Any]) -> str:
    """The first card's name as a folder: nvidia-h100-80gb-hbm3."""
    name = environment["cuda"]["devices"][0]["name"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def version_of(environment: dict[str, Any]) -> str:
    """The version that all figures of a file share: the commit, and a digest of uncommitted changes."""
    commit = environment["commit"]
    if commit is None:
        return "unknown"
    if not commit["dirty"]:
        return str(commit["id"])[:10]
    changes = subprocess.run(["git", "diff", "HEAD"], cwd=ROOT, capture_output=True, check=False).stdout
    return f"{commit['id'][:10]}-changed-{hashlib.sha256(changes).hexdigest()[:6]}"


def file_for(folder: Path, version: str, today: str) -> Path:
    """The file that an earlier run has begun for this version, or a new one with today's date."""
    begun = sorted(folder.glob(f"????-??-??-{version}.json"))
    return begun[-1] if begun else folder / f"{today}-{version}.json"
