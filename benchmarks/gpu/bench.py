# SPDX-License-Identifier: Apache-2.0
"""PART=bench: times our kernels and every contender on all shapes, forward and a training step, in three dtypes.

It measures like `vitkern bench run`, op by op and case by case, with more contenders, and writes the same kind of
file, which `vitkern bench report` and `compare` read. Rows that the file has are not measured again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.gpu import contenders
from benchmarks.gpu.common import DONE, FAILED, LEFT, STATE, Budget, demand_the_software_of
from benchmarks.gpu.resume import breaks_the_card
from vitkern.bench import schema, store
from vitkern.bench.ceilings import ANCHORS, Machine, cost
from vitkern.bench.environment import gpu_clocks
from vitkern.bench.plan import Subject
from vitkern.bench.report import write_reports
from vitkern.bench.run import ROUNDS_OF_CEILINGS, VISITS, Group, checked_groups, summarize
from vitkern.cases import Case
from vitkern.cases.ops import OPS
from vitkern.cases.record import Op, Problem
from vitkern.commands.choices import DTYPES, cases_exist, chosen, dtype_name, matches
from vitkern.commands.errors import CommandError
from vitkern.ops import backends

FOLDER = ""
USUAL_DTYPES = ("bf16", "fp16", "fp32")
PASSES = ("forward", "both")
SECONDS = 1.5  # of all visits and contenders of a pass
TIMING = "one of those timed in turn"
ROUNDS = 10  # of a visit, each the median of some calls
_PLAIN = OPS["ms_deform_attn"]
_UNIFORM = replace(_PLAIN, name="ms_deform_attn_uniform", timed={"locations": "uniform"})
# Real places lie near the query's own; places anywhere are the worst for caches, and spread the atomics.
ALL_OPS = {op.name: op for op in (*OPS.values(), _UNIFORM)}


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def subjects(
    ops: Sequence[str] = (), cases: Sequence[str] = (), dtypes: Sequence[str] = (), device: str = "cuda"
) -> list[Subject]:
    """The subjects to measure, the most telling shapes first."""
    wanted = [ALL_OPS[name] for name in chosen("op", ops, tuple(ALL_OPS)) or ALL_OPS]
    dtypes = chosen("dtype", dtypes, USUAL_DTYPES) or USUAL_DTYPES
    cases_exist(cases, (name for op in wanted for name in op.cases))
    return [
        _subject(op, name, DTYPES[dtype], device)
        for usual in (True, False)
        for op in wanted
        for name in op.cases
        if (name in op.usual) == usual and (not cases or matches(name, cases))
        for dtype in dtypes
    ]


def _subject(op: Op, name: str, dtype: torch.dtype, device: str) -> Subject:
    case = op.cases[name]
    return Subject(op, case, dtype, torch.device(device), (), PASSES, case.batch)


def listing(wanted: Sequence[Subject], without: Sequence[str] = ()) -> None:
    """Prints, without a card, the subjects to measure and the contenders that would take part, as far as known here."""
    for subject in wanted:
        dtype = store.short(dtype_name(subject.dtype))
        case = f"{subject.case.name} x{subject.batch}"
        print(f"{subject.op.name:<24}{case:<22}{dtype:<6}{' '.join(subject.passes):<15}{subject.case.what}")
    print(f"\n{len(wanted)} subjects, each with {', '.join((*contenders.OURS, 'torch'))} and")
    absent: dict[str, str] = {}
    for op in {subject.op.name: subject.op for subject in wanted}.values():
        there, others = contenders.names(op, "cuda", without)
        print(f"  {op.name}: {', '.join(there)}")
        absent |= others
    for name, reason in absent.items():
        print(f"  not {name}: {reason}")


def seconds_of_timing(wanted: Sequence[Subject]) -> float:
    return SECONDS * sum(len(subject.passes) for subject in wanted)


def run(
    wanted: Sequence[Subject],
    path: Path,
    environment: Mapping[str, object],
    budget: Budget,
    without: Sequence[str] = (),
) -> int:
    """Adds rows to the file until all are there or the time is over; then writes a table and plots beside it."""
    record = opened(path, environment)
    session = {"started": _now(), "clocks_before": gpu_clocks(), "seconds": 0.0}
    record["sessions"].append(session)
    bench = Bench(record, path, budget, without)
    left, record["status"] = list(wanted), "interrupted"
    try:
        left = bench.measure(wanted)
    except KeyboardInterrupt:
        left = bench.open(wanted)
    finally:
        session |= {"clocks_after": gpu_clocks(), "seconds": round(budget.seconds - budget.left(), 1)}
        record["seconds"] = round(sum(one["seconds"] for one in record["sessions"]), 1)
        bench.save()
    if not left:
        record["status"] = "complete"
        bench.save()
    if record["rows"]:
        write_reports(path, path.with_suffix(".md"))
    failed = [row for row in record["rows"] if not row["verified"] and row["backend"] in backends.BACKENDS]
    print(f"{path}: {len(record['rows'])} rows, {len(left)} subjects left, {len(failed)} of ours FAILED")
    for row in failed:
        print(f"FAILED {store.in_words(store.key(row))}: {row['reason']}")
    return FAILED if failed else LEFT if left else DONE


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def opened(path: Path, environment: Mapping[str, object]) -> store.Record:
    """The record of an earlier call, if it was made with the same software, or a new one."""
    if not path.exists():
        head = {"schema": schema.SCHEMA, "status": "running", "started": _now(), "seconds": 0.0}
        head |= {"command": ["make", "gpu", "PART=bench"], "environment": dict(environment), "ceilings": None}
        return head | {"anchors": ANCHORS, "absent": {}, "sessions": [], "rows": []}
    record = store.read(path)
    demand_the_software_of(record["environment"], environment, path)
    return record


class Bench:
    """A growing record, which is saved after each subject."""

    def __init__(self, record: store.Record, path: Path, budget: Budget, without: Sequence[str] = ()) -> None:
        self.record, self.path, self.budget, self.without = record, path, budget, without
        self.machine: Machine | None = None
        self.ended = STATE / f"{path.stem}.ended"

    def open(self, wanted: Sequence[Subject]) -> list[Subject]:
        """The subjects with missing rows, each with the backends that lack one."""
        there = {store.key(row) for row in self.record["rows"]}
        found = []
        for subject in wanted:
            names, absent = contenders.names(subject.op, subject.device.type, self.without)
            self.record["absent"] |= absent
            lacking = [
                name
                for name in (*_ours(subject), "torch", *names)
                if any(key_of(subject, what, name) not in there for what in subject.passes)
            ]
            if lacking:
                found.append(replace(subject, backends=tuple(lacking)))
        # A subject that ended a process comes last, so that the others are measured before it.
        return sorted(found, key=lambda subject: label_of(subject) in self._ended())

    def _ended(self) -> list[str]:
        return self.ended.read_text().splitlines() if self.ended.exists() else []

    @contextlib.contextmanager
    def _in(self, subject: Subject) -> Iterator[None]:
        """A context that leaves a note of the subject if the process ends inside."""
        before = self._ended()
        self.ended.parent.mkdir(parents=True, exist_ok=True)
        self.ended.write_text("".join(f"{label}\n" for label in {*before, label_of(subject)}))
        yield
        self.ended.write_text("".join(f"{label}\n" for label in before if label != label_of(subject)))

    def measure(self, wanted: Sequence[Subject]) -> list[Subject]:
        """Measures the subjects; returns those for which there was not enough time."""
        left = self.open(wanted)
        if left:
            self.machine = Machine(left[0].device, [DTYPES[name] for name in USUAL_DTYPES])
            self.machine.measure(ROUNDS_OF_CEILINGS)
        while left and self.budget.allows_more():
            subject = left.pop(0)
            print(f"{self.budget.left():>5.0f} s left  {label_of(subject)}", flush=True)
            with self._in(subject):
                rows = self.budget.timed(functools.partial(self.rows_of, subject))
            self._add(rows)
            broken = [row for row in rows if _is_broken(row)]
            if broken:
                raise CommandError(
                    f"{broken[0]['backend']} left the card in an undefined state at {label_of(subject)} "
                    f"({broken[0]['reason']}): call again to go on without it"
                )
        return left

    def rows_of(self, subject: Subject) -> list[store.Row]:
        """The rows of all passes and contenders, measured in turn in several visits, on inputs at other addresses."""
        names, _ = contenders.names(subject.op, subject.device.type, self.without)
        work = subject.op.workload(subject.case, subject.dtype, subject.device.type)
        names = {name: peer for name, peer in names.items() if name in subject.backends}
        others = contenders.functions(subject.op, subject.case, work, names)
        work = replace(work, others=others)
        groups = checked_groups(subject, work, costs(subject))
        if not any(_is_broken(row) for group in groups for row in group.rows):
            for visit in range(VISITS):
                work = work if visit == 0 else _elsewhere(work)
                for group in groups:
                    _measured(group, work)
        return [row for group in groups for row in group.rows]

    def _add(self, rows: list[store.Row]) -> None:
        """Adds the rows. After an error of the card, only the contender that caused it gets rows; others run later."""
        broken = [row for row in rows if _is_broken(row)]
        guilty = {broken[0]["backend"]} if broken and TIMING not in broken[0]["reason"] else None
        rows = [row for row in rows if guilty is None or row["backend"] in guilty]
        if not broken and self.machine is not None:
            self.machine.measure()
        for row in rows:
            if row["verified"]:
                row["samples_ms"], row["anchor_ms"] = _short(row["samples_ms"]), _short(row["anchor_ms"])
        self.record["rows"] += rows
        self.save(rows)

    def save(self, rows: Sequence[store.Row] | None = None) -> None:
        """Saves the record. `rows`: the new ones; None: all rows are updated with the best measured rates."""
        if self.machine is not None:
            self.record["ceilings"] = best(self.record["ceilings"], self.machine.ceilings)
        for row in self.record["rows"] if rows is None else rows:
            if row["verified"]:
                summarize(row, self.record["ceilings"])
        store.write(self.path, self.record)


def _ours(subject: Subject) -> list[str]:
    names = contenders.OURS if subject.device.type == "cuda" else ("cpu",)
    return [name for name in names if backends.can_run(name, subject.device, subject.dtype) is None]


def label_of(subject: Subject) -> str:
    dtype = store.short(dtype_name(subject.dtype))
    return f"{subject.op.name} {subject.case.name} x{subject.batch} {dtype}"


def key_of(subject: Subject, what: str, backend: str) -> tuple[object, ...]:
    return store.key({**subject.key, "pass": what, "backend": backend})


def costs(subject: Subject) -> dict[str, tuple[int, int]]:
    """Bytes and operations of each pass. Counting takes as long as making inputs, so the dtypes of a case share it."""
    size = subject.dtype.itemsize
    return {
        what: (moved // 8 * size, operations)
        for what, (moved, operations) in _costs_in_float64(subject.op, subject.case).items()
    }


@functools.lru_cache(maxsize=1)
def _costs_in_float64(op: Op, case: Case) -> dict[str, tuple[int, int]]:
    return cost(op, case, torch.float64)


def _elsewhere(work: Problem) -> Problem:
    """The same inputs at other addresses: drawing new ones would take longer than the measurement."""
    return replace(work, inputs={name: tensor.clone() for name, tensor in work.inputs.items()})


def _measured(group: Group, work: Problem) -> None:
    """Measures a group. If timing raises an error, its rows lose all figures and are marked as failed."""
    try:
        group.measure(work, SECONDS / VISITS, ROUNDS)
    except Exception as error:
        for row in group.rows:
            figures = ("samples_ms", "anchor_ms", "anchor", "peak_bytes", "bytes", "flops")
            for figure in (*figures, *schema.FIGURES_OF_CARDS):
                row.pop(figure, None)
            reason = row["reason"] or f"{TIMING} raised {type(error).__name__}: {error}"[:200]
            row |= {"verified": False, "reason": reason}


def _is_broken(row: store.Row) -> bool:
    return not row["verified"] and breaks_the_card(row["reason"])


def best(one: Mapping | None, other: Mapping) -> dict:
    """The highest rates of several sessions."""
    if one is None:
        return {what: dict(rates) for what, rates in other.items()}
    return {
        what: {name: max(rate, one[what].get(name, 0.0)) for name, rate in rates.items()}
        for what, rates in other.items()
    }


def _short(visits: list[list[float]]) -> list[list[float]]:
    return [[float(f"{sample:.5g}") for sample in visit] for visit in visits]
