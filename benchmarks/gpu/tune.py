# SPDX-License-Identifier: Apache-2.0
"""PART=tune: times the Triton kernels with one block size changed at a time, against the chosen sizes.

Sizes of the CUDA kernels are compile-time constants, which cannot be tried at run time: COMPILED_IN lists them. To
try one, change it, build both versions into separate environments, and compare them:
`vitkern bench compare --live .venv-before .venv-after --op OP --device cuda`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import bench
from benchmarks.gpu.common import DONE, LEFT, ROOT, Budget, opened, show
from benchmarks.gpu.resume import breaks_the_card
from vitkern.bench import store
from vitkern.bench.measure import clock_of, interleaved
from vitkern.bench.plan import Subject
from vitkern.bench.run import call
from vitkern.bench.verify import complaint, errors_of, exact_results
from vitkern.cases.ops import OPS
from vitkern.cases.record import Problem
from vitkern.commands.errors import CommandError
from vitkern.ops import backends

FOLDER = "tune"
SECONDS = 1.0  # of all alternatives of a table, after they were compiled
ROUNDS = 30
Change = tuple[str, str]  # of which size, and how
SIZES: dict[str, Callable] = {"halved": lambda size: size // 2, "doubled": lambda size: 2 * size}
STAGES: dict[str, Callable] = {"one less": lambda stages: stages - 1, "one more": lambda stages: stages + 1}
REGISTERS = {"none": None, "48": 48, "64": 64, "96": 96, "128": 128}


@dataclass(frozen=True)
class Table:
    """A launch table of a module of kernels, and the sizes in it that may be changed."""

    op: str
    module: str
    function: str
    backward: bool
    free: tuple[str, ...]  # the others have to cover a whole dimension

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}{', backward' if self.backward else ''}"

    @property
    def told_the_pass(self) -> bool:
        """Whether an argument tells the function which pass it chooses for."""
        return self.function == "launch_table" and self.module != "token_project"

    @property
    def passes(self) -> str:
        return "backward" if self.backward else "forward"


_ATTENTION = ("BLOCK_Q", "num_warps", "maxnreg")
_PRODUCTS = ("BLOCK_N", "BLOCK_P", "BLOCK_Q", "num_warps", "num_stages")
_TILES = ("BLOCK_N", "BLOCK_C", "num_warps", "num_stages")
TABLES = (
    Table("ms_deform_attn", "ms_deform_attn", "launch_table", False, (*_ATTENTION, "BLOCK_D")),
    Table("ms_deform_attn", "ms_deform_attn", "launch_table", True, _ATTENTION),
    Table("ms_deform_attn_fused", "ms_deform_attn", "launch_table", False, (*_ATTENTION, "BLOCK_D")),
    Table("ms_deform_attn_fused", "ms_deform_attn", "launch_table", True, _ATTENTION),
    Table("adapter_bottleneck", "adapter_bottleneck", "launch_table", False, _TILES),
    Table("adapter_bottleneck", "adapter_bottleneck", "launch_table", True, _TILES),
    Table("adapter_bottleneck", "tiles", "products_table", True, _PRODUCTS),
    Table("token_pool", "token_pool", "launch_table", False, (*_TILES, "BLOCK_K")),
    Table("token_pool", "token_pool", "launch_table", True, (*_TILES, "BLOCK_K")),
    Table("token_pool", "token_pool", "merge_table", False, ("BLOCK_S", "BLOCK_C", "num_warps")),
    Table("token_project", "token_project", "launch_table", False, _TILES),
    Table("token_project", "token_project", "launch_table", True, _TILES),
    Table("token_project", "tiles", "products_table", True, _PRODUCTS),
)
# Constants of csrc/, which are compiled in.
COMPILED_IN = (
    *("kThreads", "kMinBlocks", "kAtOnce", "kFilingLanes"),
    *("kBlockThreads", "kColumns", "kChunkBytes", "kBlocksWanted", "kBlocksAtLeast"),
    *("kPoolMinBlocks", "kUsual", "kWide", "kOfManyTokens"),
)


def subjects(
    ops: Sequence[str] = (), cases: Sequence[str] = (), dtypes: Sequence[str] = (), device: str = "cuda"
) -> list[Subject]:
    """The usual shapes, unless the user names others."""
    known = {table.op for table in TABLES}
    found = bench.subjects(ops, cases, dtypes or ("bf16", "fp32"), device)
    return [
        subject
        for subject in found
        if subject.op.name in known and (cases or subject.case.name in OPS[subject.op.name].usual)
    ]


def alternatives(chosen: Mapping[str, Any], free: Sequence[str]) -> list[Change]:
    """The changes to try: each free size halved and doubled, one stage more and one less, other limits of registers."""
    found: list[Change] = []
    for name in free:
        if name == "maxnreg":
            found += [(name, how) for how in REGISTERS if REGISTERS[how] != chosen.get(name)]
        elif name in chosen:
            found += [(name, how) for how in (STAGES if name == "num_stages" else SIZES)]
    return found


def applied(sizes: Mapping[str, Any], change: Change | None) -> dict[str, Any]:
    if change is None:
        return dict(sizes)
    name, how = change
    merged = dict(sizes)
    merged[name] = REGISTERS[how] if name == "maxnreg" else (SIZES | STAGES)[how](sizes[name])
    if merged[name] is None:
        del merged[name]
    if "WHOLE" in merged:  # that a program holds all channels, which fewer of them at a time rule out
        merged["WHOLE"] = merged["WHOLE"] and merged["BLOCK_C"] >= sizes["BLOCK_C"]
    return merged


@contextlib.contextmanager
def changed(table: Table, change: Change | None) -> Iterator[dict[str, Any]]:
    """A context in which launches use the table's sizes with a change; yields a dictionary of the chosen sizes."""
    module = importlib.import_module(f"vitkern.triton_kernels.{table.module}")
    original: Callable[..., dict] = getattr(module, table.function)
    chosen: dict[str, Any] = {}

    def other(*arguments: Any, **options: Any) -> dict[str, Any]:
        sizes = original(*arguments, **options)
        # True alone says backward: a size may be 1. Where one table serves both passes, the pass that is timed decides.
        backward = any(value is True for value in (*arguments, *options.values()))
        if table.told_the_pass and backward != table.backward:
            return sizes
        chosen.update(sizes)
        return applied(sizes, change)

    setattr(module, table.function, other)
    try:
        yield chosen
    finally:
        setattr(module, table.function, original)


def listing(wanted: Sequence[Subject]) -> None:
    for subject in wanted:
        for table in _tables_of(subject):
            print(f"{bench.label_of(subject):<48}{table.name:<44}{', '.join(table.free)}")
    print("\nNot to be tried at run time, since every CUDA kernel is compiled for them:")
    for constant in COMPILED_IN:
        print(f"  {constant:<16}{', '.join(defined_in(constant))}")


def seconds_of_timing(wanted: Sequence[Subject]) -> float:
    return SECONDS * sum(len(_tables_of(subject)) for subject in wanted)


def defined_in(constant: str) -> list[str]:
    """The files of the CUDA kernels that define the constant."""
    files = sorted(path for kind in ("*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(kind))
    defines = re.compile(rf"constexpr \w+ {constant}\s*=")
    return [str(path.relative_to(ROOT)) for path in files if defines.search(path.read_text())]


def run(
    wanted: Sequence[Subject],
    path: Path,
    environment: Mapping[str, object],
    budget: Budget,
) -> int:
    """Adds a row for each shape and table until all are there or the time is over."""
    record = opened(path, environment)
    there = {tuple(row["key"]) for row in record["rows"]}
    left = [
        (subject, table)
        for subject in wanted
        for table in _tables_of(subject)
        if backends.can_run("triton", subject.device, subject.dtype) is None
        and (bench.label_of(subject), table.name) not in there
    ]
    with contextlib.suppress(KeyboardInterrupt):
        while left and budget.allows_more():
            subject, table = left[0]
            print(f"{budget.left():>5.0f} s left  {bench.label_of(subject)}  {table.name}", flush=True)
            row = budget.timed(functools.partial(measure, subject, table))
            record["rows"].append({"key": [bench.label_of(subject), table.name], **row})
            del left[0]
            store.write(path, record)
            demand_a_whole_card(row)
    show(in_words(record["rows"]), path, len(record["rows"]), len(left))
    return LEFT if left else DONE


def demand_a_whole_card(row: Mapping[str, Any]) -> None:
    for one in row["alternatives"]:
        if breaks_the_card(one.get("reason", "")):
            raise CommandError(
                f"{one['change']} left the card in an undefined state: call again to go on after it"
            )


def _tables_of(subject: Subject) -> list[Table]:
    return [table for table in TABLES if table.op == subject.op.name]


def measure(subject: Subject, table: Table) -> dict[str, Any]:
    """The chosen sizes and each alternative, with milliseconds or a reason for none; all are timed in turn."""
    work = subject.op.workload(subject.case, subject.dtype, subject.device.type)
    exact = exact_results(work)
    with changed(table, None) as chosen:
        errors_of(work.implementation("triton"), work, exact)
    changes: list[Change | None] = [None, *alternatives(chosen, table.free)]
    reasons = {}
    for at, change in enumerate(changes):
        with changed(table, change):
            try:
                errors = errors_of(work.implementation("triton"), work, exact)
                reasons[at] = complaint(errors, subject.dtype)
            except Exception as error:  # more than the card has, or than the kernel allows
                reasons[at] = f"raised {type(error).__name__}: {error}".splitlines()[0][:160]
    right = {str(at): _timed(work, table, changes[at]) for at, reason in reasons.items() if reason is None}
    samples = interleaved(right, rounds=ROUNDS, seconds=SECONDS, clock=clock_of(subject.device))
    return {
        "chosen": dict(chosen),
        "alternatives": [
            {"change": change, "ms": statistics.median(samples[str(at)])}
            if reasons[at] is None
            else {"change": change, "ms": None, "reason": reasons[at]}
            for at, change in enumerate(changes)
        ],
    }


def _timed(work: Problem, table: Table, change: Change | None) -> Callable[[], object]:
    once = call(work, "triton", table.passes)

    def timed() -> object:
        with changed(table, change):
            return once()

    return timed


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each table and change, its time over that of the chosen sizes: mean, least and most over the shapes."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        (label, table), (first, *others) = row["key"], row["alternatives"]
        op, _, _, dtype = label.split()
        for other in others:
            if first["ms"] and other["ms"]:
                key = f"{op}: {table}", dtype, " ".join(other["change"])
                found.setdefault(key, []).append(other["ms"] / first["ms"])
    lines = [
        "| table | dtype | change | shapes | time over chosen | least | most |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for (table, dtype, change), ratios in sorted(found.items()):
        mean = statistics.geometric_mean(ratios)
        lines.append(
            f"| {table} | {dtype} | {change} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )
    return "\n".join(lines)
