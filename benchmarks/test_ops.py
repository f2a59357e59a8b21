# SPDX-License-Identifier: Apache-2.0
"""pytest benchmarks: the rows of `vitkern bench run --quick` through pytest-benchmark, for those who keep its history.

The test of a wrong result fails, without a time. `-k "token_pool and bf16"` selects rows; `--benchmark-autosave` and
`--benchmark-compare` are options of pytest-benchmark.
"""

from __future__ import annotations

import functools

import pytest

from vitkern.bench.plan import Request, Subject, plan
from vitkern.bench.run import Check, call, check, checked_row
from vitkern.bench.store import key, short
from vitkern.cases.record import Problem
from vitkern.commands.choices import dtype_name

ROWS = [
    pytest.param(
        subject,
        what,
        backend,
        id=f"{subject.op.name}-{subject.case.name}-{short(dtype_name(subject.dtype))}-{what}-{backend}",
    )
    for subject in plan(Request(quick=True))
    for what in subject.passes
    for backend in subject.backends
]


@functools.lru_cache(maxsize=1)  # rows of a subject follow one another
def checked(subject: Subject) -> tuple[Problem, dict[str, Check]]:
    work = subject.op.workload(subject.case, subject.dtype, subject.device.type)
    return work, check(subject, work)


@pytest.mark.parametrize("subject, what, backend", ROWS)
def test_op(subject: Subject, what: str, backend: str, benchmark) -> None:
    work, checks = checked(subject)
    row = checked_row(subject, what, backend, checks[backend])
    assert row["verified"], row["reason"]
    benchmark.group = " ".join(map(str, key(row)[:-1]))
    benchmark.extra_info.update(row)
    benchmark(call(work, backend, what))
