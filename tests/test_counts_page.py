# SPDX-License-Identifier: Apache-2.0
"""The committed counts and docs/counts.md are those of today's kernels."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch

from benchmarks.counts import __main__ as command
from benchmarks.counts import baseline, cases, chain, counter, machine_code, page, record
from benchmarks.static import compilers
from tests import emulated
from vitkern import reference
from vitkern.cases import ATTENTION_CASES, make_inputs

pytestmark = [
    pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON)),
    pytest.mark.xdist_group("counts"),  # one worker builds what counts
]


@pytest.fixture(scope="module")
def small():
    """The counts of all small cases."""
    return {case.name: record.of_case(case, case.run()) for case in cases.small()}


def test_small_shapes_of_every_kernel_are_counted_as_before(small):
    """If a count has changed, `make counts` updates the file."""
    assert command.differences(small) == []


def test_every_kernel_is_counted(small):
    names = {row["kernel"] for one in small.values() for row in one["launches"]}
    launched = set()
    for op in record.OPS:
        launched |= set(
            re.findall(r'launch\w*(?:<\w+>)?\(\s*"(\w+)"', (counter.CSRC / op / "cuda.cu").read_text())
        )
    assert {"ms_deform_attn_forward", "token_pool_merge"} < launched <= names


def test_each_output_is_stored_once(small):
    """The test would show a store that is missed or counted twice."""
    for name, sizes in {
        "ms_deform_attn plain small fp32 sigma 2 px": 2 * 11 * 3 * 32 * 4,
        "ms_deform_attn plain small bf16 sigma 2 px": 2 * 11 * 3 * 32 * 2,
        "ms_deform_attn plain small-odd fp32 uniform": 2 * 5 * 3 * 37 * 4,
        "adapter_bottleneck small fp32": 13 * 768 * 4,
        "adapter_bottleneck small bf16": 13 * 768 * 2,
        "token_project small bf16": 53 * 256 * 2,
    }.items():
        rows = small[name]["launches"][0]["global"]
        stored = sum(bytes_ * lanes for what, bytes_, _, _, lanes, *_ in rows if what == "store")
        kept = 13 * 64 * 4 if "adapter" in name else 0  # z, for backward
        assert stored == sizes + kept, name


def test_the_page_is_that_of_todays_kernels():
    assert page.problems(record.committed()) == []


def test_a_kernel_that_has_changed_is_told(monkeypatch):
    monkeypatch.setattr(record, "digest", lambda op: "another")
    assert [text for text in page.problems(record.committed()) if "make counts" in text]


def test_a_count_that_has_changed_is_told(small):
    name, row = next(iter(small.items()))
    changed = json.loads(json.dumps(row))
    changed["launches"][1]["global"][0][3] += 1
    assert command.differences({name: changed}) == [
        f"{name}: ms_deform_attn_backward differ from counts.json"
    ]


def test_a_sample_of_blocks_stands_for_all():
    assert max(page.sampling_errors(record.committed()).values()) < 0.01


# The same mapping, four queries and eight heads a block, by another trace: misses of L1, rows left after merging.
MAPPING = {"initial": (0.233, 0.33), "sigma 2 px": (0.416, 0.63), "uniform": (0.859, 0.94)}


@pytest.mark.parametrize("places", MAPPING)
def test_the_model_agrees_with_another_trace(places):
    known = record.committed()
    (row,) = (one for one in known["modelled"] if (one["dtype"], one["places"]) == ("fp32", places))
    misses, left = MAPPING[places]
    assert row["missed"] == pytest.approx(misses, abs=0.02)
    assert page.left_after_merging(known, "fp32", places) == pytest.approx(left, rel=0.1)


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("dtype", machine_code.DTYPES)
def test_a_trip_of_the_hot_loop_asks_for_what_the_machine_code_does(dtype, form):
    rows = [r for r in record.committed()["machine code"]["rows"] if (r["dtype"], r["form"]) == (dtype, form)]
    assert len(rows) == 2
    found = machine_code.counted(dtype, form)
    for row in rows:
        assert found[f"ms_deform_attn_{row['kernel']}"] == (row["loop"], row["trip"])
    assert machine_code.disagreements({"rows": rows}) == []


@pytest.mark.slow
@pytest.mark.skipif(compilers.nvcc() is None, reason="nvcc was not found")
def test_the_machine_code_is_todays():
    committed, measured = record.committed()["machine code"], machine_code.measure()
    assert machine_code.disagreements(measured) == []
    if committed["nvcc"] == measured["nvcc"]:
        assert committed == measured


@pytest.mark.parametrize("form", ["plain", "deterministic"])
def test_the_longest_chain_is_what_changed_numbers_say(form, monkeypatch):
    monkeypatch.setattr(chain, "FORMS", (form,))
    monkeypatch.setattr(chain, "_of_baseline", lambda case, name: counter.Counted(None))
    found = chain.measure()[form]
    assert found == record.committed()["chains"][form]
    assert [len(tensors) for tensors in found.values()] == ([2, 2] if form == "plain" else [4])


@pytest.mark.parametrize("op", cases.DENSE)
def test_no_other_op_reads_where_a_tensor_says(op):
    shape = cases.DENSE[op][0].shrunk()

    def with_others(device: str) -> cases.Call:
        call = cases.dense(op, shape, "fp32", device)
        with torch.no_grad():
            for tensor in call.inputs.values():
                tensor.mul_(-1.5)
        return call

    same, others = (
        cases.counted(make) for make in (functools.partial(cases.dense, op, shape, "fp32"), with_others)
    )
    assert chain.addresses(same.launches) == chain.addresses(others.launches)


def test_the_baseline_is_right():
    case = ATTENTION_CASES["detr-encoder"].shrunk()
    inputs = make_inputs(case)
    grad_output = torch.randn(case.batch, case.query_count, case.heads * case.channels)
    _, found = baseline.run(inputs, grad_output)
    leaves = [tensor.requires_grad_() for tensor in inputs.differentiable()]
    where, weights = leaves[1].flatten(3, 4), leaves[2].flatten(3)
    tables = (inputs.spatial_shapes, inputs.level_start_index)
    output = reference.ms_deform_attn(leaves[0], *tables, where, weights, (case.points,) * 4, "bilinear")
    for ours, theirs in zip(found, (output, *torch.autograd.grad(output, leaves, grad_output))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
