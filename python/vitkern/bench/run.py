# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench run`: checks, times and records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from vitkern.bench import schema, store
from vitkern.bench.ceilings import ANCHORS, Ceilings, Machine, anchor, cost, limit
from vitkern.bench.environment import environment, in_words
from vitkern.bench.measure import (
    Run,
    Sample,
    backward_alone,
    clock_of,
    forward_backward,
    interleaved,
    peak_megabytes,
)
from vitkern.bench.plan import Request, Subject, plan
from vitkern.bench.verdicts import Factor, moved
from vitkern.bench.verify import complaint, errors_of, exact_results
from vitkern.cases.record import Problem
from vitkern.commands.choices import dtype_name
from vitkern.commands.progress import Progress

# A row is measured in several visits, minutes apart, on new inputs each time, so that a slow moment or an unlucky
# address of the memory does not decide the row.
VISITS = 3
ROUNDS = 50  # of a visit, at most
LEAST_ROUNDS = 2
ROUNDS_OF_CEILINGS = 5  # at the start; one more after each case
SECONDS = {True: 1.0, False: 4.0}  # of all visits, backends and the anchor: in a quick run, and otherwise


def run(
    request: Request, *, file: store.File | None, seconds: float | None, command: Sequence[str]
) -> store.Record:
    """Measures all that the request names. After an interruption it ends in order with the rows so far."""
    subjects = plan(request)
    seconds = SECONDS[request.quick] if seconds is None else seconds
    started = time.monotonic()
    record: store.Record = {
        "schema": schema.SCHEMA,
        "status": "running",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "command": list(command),
        "environment": environment(),
        "ceilings": None,
        "anchors": ANCHORS,
        "rows": [],
    }

    def save(status: str) -> None:
        for row in record["rows"]:
            if row["verified"]:
                summarize(row, record["ceilings"])
        record.update(status=status, seconds=round(time.monotonic() - started, 1))
        if file is not None:
            file.write(record)

    save("running")
    try:
        for _ in _steps(subjects, seconds / VISITS, record):
            save("running")
    except BaseException as error:  # the rows measured so far are saved after any error
        save("interrupted")
        if not isinstance(error, KeyboardInterrupt):
            raise
    else:
        save("complete")
    print(in_words(record["environment"]))
    print(HEADING + (HEADING_OF_CARD if any(map(store.megahertz, record["rows"])) else ""))
    held_up = store.held_up(record["rows"])
    for row in record["rows"]:
        print(line(row, record["rows"], held_up))
    if held_up:
        print(advice(held_up))
    return record


def _steps(subjects: Sequence[Subject], seconds: float, record: store.Record) -> Iterator[None]:
    """Fills the record, which can be written after each step."""
    machine = Machine(subjects[0].device, {subject.dtype for subject in subjects})
    groups: dict[Subject, list[Group]] = {}
    with Progress(1 + sum(1 + VISITS * len(subject.passes) for subject in subjects)) as progress:
        progress.step("what the machine can do")
        machine.measure(ROUNDS_OF_CEILINGS)
        record["ceilings"] = machine.ceilings
        for visit in range(VISITS):
            for subject in subjects:
                where = f"{subject.op.name} {subject.case.name} {store.short(dtype_name(subject.dtype))}"
                work = subject.op.workload(subject.case, subject.dtype, subject.device.type)
                if visit == 0:
                    progress.step(f"{where}: check")
                    groups[subject] = checked_groups(subject, work)
                for group in groups[subject]:
                    progress.step(f"{where}: {group.what}")
                    group.measure(work, seconds)
                    if visit == 0:
                        record["rows"] += group.rows
                    yield
                machine.measure()


@dataclass(frozen=True)
class Check:
    """The result of one backend: errors by result, or the reason why there are none."""

    errors: dict[str, float]
    reason: str | None = None

    def of(self, what: str) -> dict[str, float]:
        """The errors of the results of a pass."""
        return {
            name: error
            for name, error in self.errors.items()
            if what == "both" or (name == "output") == (what == "forward")
        }


@dataclass
class Group:
    """A pass of a subject: the rows of all backends, measured in turn."""

    subject: Subject
    what: str
    rows: list[store.Row]
    calls: dict[str, int] = field(default_factory=dict)  # of a sample; the same in all visits

    def measure(self, work: Problem, seconds: float, rounds: int | None = None) -> None:
        """Makes another visit to the rows that are right; the first visit measures memory too."""
        right = [row for row in self.rows if row["verified"]]
        if not right:
            return
        device, kind = self.subject.device, self.subject.op.anchor
        runs = {row["backend"]: call(work, row["backend"], self.what) for row in right}
        more: dict[str, list[Sample]] = {}
        samples = interleaved(
            runs | {"anchor": anchor(kind, device)},
            rounds=rounds or ROUNDS,
            least=LEAST_ROUNDS,
            seconds=seconds,
            clock=clock_of(device),
            calls=self.calls,
            more=more,
        )
        for row in right:
            if "peak_bytes" not in row:
                row["peak_bytes"] = peak_megabytes(runs[row["backend"]], device) * 2**20
            # In one step, so that an interruption finds both or neither.
            row.update(
                anchor=kind,
                samples_ms=[*row.get("samples_ms", ()), samples[row["backend"]]],
                anchor_ms=[*row.get("anchor_ms", ()), samples["anchor"]],
                **_of_card(row, more.get(row["backend"], ())),
            )


def _of_card(row: store.Row, samples: Sequence[Sample]) -> store.Row:
    """The figures of a row that only a card's clock has, with those of another visit."""
    if not samples:
        return {}
    return {
        "host_ms": [*row.get("host_ms", ()), [one.host_ms for one in samples]],
        "megahertz": [*row.get("megahertz", ()), [round(one.megahertz, 1) for one in samples]],
        "ahead": row.get("ahead", True) and all(one.ahead for one in samples),
    }


def checked_groups(
    subject: Subject, work: Problem, costs: dict[str, tuple[int, int]] | None = None
) -> list[Group]:
    """A group for each pass, with the checks of every backend and the pass's cost, computed here if not given."""
    checks = check(subject, work)
    costs = costs or cost(subject.op, subject.case, subject.dtype)
    groups = []
    for what in subject.passes:
        rows = [checked_row(subject, what, backend, checks[backend]) for backend in subject.backends]
        for row in rows:
            if row["verified"]:
                row["bytes"], row["flops"] = costs[what]
        groups.append(Group(subject, what, rows))
    return groups


def check(subject: Subject, work: Problem) -> dict[str, Check]:
    """Checks each backend against the formula in float64; an exception is a failure of that backend only."""
    try:
        exact = exact_results(work)
    except Exception as error:
        reason = f"the float64 formula raised {_first_line(error)}"
        return dict.fromkeys(subject.backends, Check({}, reason))
    checks = {}
    for backend in subject.backends:
        try:
            checks[backend] = Check(errors_of(work.implementation(backend), work, exact))
        except Exception as error:
            checks[backend] = Check({}, f"raised {_first_line(error)}")
    return checks


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def checked_row(subject: Subject, what: str, backend: str, check: Check) -> store.Row:
    errors = check.of(what)
    reason = check.reason or complaint(errors, subject.dtype)
    return {
        **subject.key,
        "pass": what,
        "backend": backend,
        "verified": reason is None,
        "errors": errors,
        "reason": reason,
    }


def call(work: Problem, backend: str, what: str) -> Run:
    """A pass without arguments, as it is timed."""
    function = work.implementation(backend)
    leaves = tuple(tensor.detach().requires_grad_(what != "forward") for tensor in work.inputs.values())
    if what == "forward":
        return lambda: function(*leaves)
    return (backward_alone if what == "backward" else forward_backward)(function, leaves)


def summarize(row: store.Row, ceiling: Ceilings) -> None:
    """Computes the figures of a row from its samples and from the machine's best rates so far."""
    times = [time for visit in row["samples_ms"] for time in visit]
    low, *_, high = statistics.quantiles(times, n=5)
    row["ms"] = {"min": min(times), "p20": low, "p50": statistics.median(times), "p80": high}
    taken, moved, operations = store.milliseconds(row), row["bytes"], row["flops"]
    least, bound = limit(ceiling, row["dtype"], moved, operations)
    row["gb_per_s"], row["gflop_per_s"] = moved / taken / 1e6, operations / taken / 1e6
    row["limit_ms"], row["share"], row["bound"] = least, least / taken, bound


HEADING = f"{store.HEADING}{'ms':>9}{'over torch':>12}{'of the limit':>14}{'MB':>9}"
HEADING_OF_CARD = f"{'host ms':>10}{'MHz':>7}"


def advice(held_up: Collection[object]) -> str:
    return f"{len(held_up)} rows were held up by other work: run them again on a quieter machine"


def line(row: store.Row, rows: Sequence[store.Row], held_up: Collection[tuple[Any, ...]]) -> str:
    """A line of the table. `rows`: the rows measured together with it; `held_up`: keys of store.held_up."""
    text = store.in_words(store.key(row))
    if not row["verified"]:
        return f"{text}  FAILED: {row['reason']}"
    faster = faster_in_words(row, rows, held_up) or "-"
    share = f"{row['share']:.0%} {row['bound'][:5]}"
    text += f"{store.milliseconds(row):>9.3f}{faster:>12}{share:>14}{(row['peak_bytes'] or 0) / 2**20:>9.1f}"
    if not store.megahertz(row):
        return text
    host, clock = of_card_in_words(row)
    return f"{text}{host:>10}{clock:>7}"


def of_card_in_words(row: store.Row) -> tuple[str, str]:
    """The host's milliseconds of a call, marked where the card waited for it, and the card's clock."""
    host = statistics.median(time for visit in row["host_ms"] for time in visit)
    return f"{host:.3f}{'' if row['ahead'] else ' !'}", f"{statistics.median(store.megahertz(row)):.0f}"


def faster_in_words(row: store.Row, rows: Sequence[store.Row], held_up: Collection[tuple[Any, ...]]) -> str:
    """The speed-up, unless other work or a card's clock may have made it; arguments and gaps are those of speedup."""
    plain = _plain(row, rows)
    if store.key(row) in held_up:
        return "held up"
    if plain is None:
        return ""
    ratio = store.milliseconds(plain) / store.milliseconds(row)
    clock = moved(store.megahertz(row, plain))
    if Factor(ratio, ratio, ratio).verdict(0.0, clock) == "ambiguous":
        return "ambiguous"
    return f"{ratio:.2f}x"


def speedup(row: store.Row, rows: Sequence[store.Row]) -> float | None:
    """The speed-up over plain torch in the same rounds; None for plain torch, or if plain torch has no time."""
    plain = _plain(row, rows)
    return None if plain is None else store.milliseconds(plain) / store.milliseconds(row)


def _plain(row: store.Row, rows: Sequence[store.Row]) -> store.Row | None:
    """The row of plain torch that another was timed in turn with."""
    if row["backend"] == "torch" or not row["verified"]:
        return None
    wanted = store.key(row)[:-1]
    # Cheap comparisons come first: there may be thousands of rows.
    plain = (other for other in rows if other["backend"] == "torch" and other["case"] == row["case"])
    return next((other for other in plain if other["verified"] and store.key(other)[:-1] == wanted), None)
