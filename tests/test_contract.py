# SPDX-License-Identifier: Apache-2.0
"""Every check of `vitkern check` as a test: each op, on each setting of its record, with each runner of the kernels.

The settings are in vitkern/cases. Memory is guarded here, and kernels that only a checkout can build run too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_right, guarded_memory
from tests.runners import ORDERED, REFERENCE, RUNNERS
from vitkern.cases import AdapterBottleneckCase, MsDeformAttnCase, TokenCase
from vitkern.cases.ops import OPS
from vitkern.check import compare
from vitkern.check.examine import examine
from vitkern.check.plan import Request, Task, plan


def checks_of(runner) -> Iterator[tuple[tuple[str, str], ParameterSet]]:
    """The checks by op and setting; all dtypes of a setting are one test."""
    if runner.reason is not None:
        for op in OPS:
            yield (op, ""), pytest.param([], id=f"{runner.name}-{op}", marks=runner.marks)
        return
    ops = [op for op in OPS if runner is not ORDERED or op.startswith("ms_deform_attn")]
    kinds = ["oracle", "subset"] if runner is ORDERED else []
    tasks = plan(Request(ops, kinds=kinds), [runner]).tasks
    for key, group in itertools.groupby(tasks, lambda task: (task.op, task.kind, task.case)):
        op, _, case = key
        yield (op, case), pytest.param(list(group), id="-".join((runner.name, *key)), marks=runner.marks)


# All runners on one setting follow one another: what they are compared with is computed once.
TESTS = [test for runner in (REFERENCE, *RUNNERS, ORDERED) for test in checks_of(runner)]
TESTS.sort(key=lambda test: test[0])


@pytest.mark.parametrize("tasks", [test for _, test in TESTS])
def test_contract(tasks: list[Task], monkeypatch):
    # Stricter than `vitkern check`, which has to pass with any seed.
    monkeypatch.setitem(compare.UNITS, torch.float32, 8)
    for task in tasks:
        with guarded_memory():
            assert examine(task).failures == [], task.dtype


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@given(
    batch=st.integers(1, 3),
    levels=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    queries=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33]),
    heads=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 96, 130]),
    points=st.integers(1, 9),
    dtype=DTYPES,
    spread=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_drawn_attention(batch, levels, queries, heads, channels, points, dtype, spread, seed):
    case = MsDeformAttnCase("drawn", "", batch, tuple(levels), queries, heads, channels, points)
    assert_right("ms_deform_attn", case, dtype, seed=seed, spread=spread)


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    channels=st.integers(1, 70),
    hidden=st.integers(1, 70),
    activation=st.sampled_from(["relu", "gelu", "silu"]),
    dtype=DTYPES,
    p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 999),
)
def test_drawn_adapter(shape, channels, hidden, activation, dtype, p, seed):
    case = AdapterBottleneckCase("drawn", "", tuple(shape), channels, hidden)
    options = {"activation": activation, "dropout_p": p, "training": True}
    assert_right("adapter_bottleneck", case, dtype, seed=seed, **options)


@given(
    batch=st.integers(1, 3),
    pixels=st.integers(2, 150),  # of one pixel the gradient of the weight is 0, but for roundings
    channels=st.integers(1, 70),
    tokens=st.integers(1, 70),
    dtype=DTYPES,
    recurrent=st.booleans(),
    seed=st.integers(0, 999),
)
def test_drawn_pooling(batch, pixels, channels, tokens, dtype, recurrent, seed):
    case = TokenCase("drawn", "", batch, pixels, channels, tokens)
    assert_right("token_pool", case, dtype, seed=seed, recurrent=recurrent)


@given(
    batch=st.integers(1, 3),
    pixels=st.integers(1, 80),
    channels=st.integers(1, 70),
    tokens=st.integers(1, 70),
    keys=st.integers(1, 40),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_drawn_projection(batch, pixels, channels, tokens, keys, dtype, seed):
    case = TokenCase("drawn", "", batch, pixels, channels, tokens)
    assert_right("token_project", case, dtype, seed=seed, keys=keys)
