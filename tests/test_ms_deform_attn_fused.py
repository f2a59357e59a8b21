# SPDX-License-Identifier: Apache-2.0
"""The fused form beyond its contract in test_contract.py: 16-bit boxes, wrong arguments, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vitkern
from vitkern.cases import MsDeformAttnCase
from vitkern.cases.attention_ops import ms_deform_attn_fused

SMALL = MsDeformAttnCase("small", "", 2, ((5, 7), (3, 4), (2, 1)), 9, 3, 16, 3)


def call(tables, backend, **options):
    def function(value, reference, offsets, logits):
        return vitkern.ms_deform_attn_fused(
            value, *tables, reference, offsets, logits, backend=backend, **options
        )

    return function


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_boxes_are_widened_before_they_are_divided(runner, dtype):
    """Division by the three points of a level would round a 16-bit box."""
    case = replace(SMALL, levels=((64, 64),), batch=1 if runner.tiny else 2)
    problem = ms_deform_attn_fused(case, runner.device, 0, form="boxes").to(torch.float32)
    tensors, tables = list(problem.inputs.values()), problem.tables
    tensors[1] = tensors[1].to(dtype)
    exact = call(tables, "reference")(*(t.double() for t in tensors))
    for backend in (runner.backend, "reference"):
        actual = call(tables, backend)(*tensors).double()
        torch.testing.assert_close(actual, exact, atol=1e-4, rtol=0, msg=backend)


def make_small():
    problem = ms_deform_attn_fused(SMALL, "cpu", 0)
    return list(problem.inputs.values()), problem.tables


MISTAKES = {
    "reference_points must be [B or 1, Q, L or 1, 2 or 4] with B=2, Q=9, L=3": lambda v, r, o, z: (
        v,
        r[..., :1],
        o,
        z,
    ),
    "got [2, 8, 3, 2]": lambda v, r, o, z: (v, r[:, :8], o, z),
    "sampling_offsets must be [B, Q, M, L, P, 2]": lambda v, r, o, z: (v, r, o[:, :, :, :2], z),
    "attention_logits must be [2, 9, 3, 9], like sampling_offsets": lambda v, r, o, z: (v, r, o, z[..., :8]),
    "ms_deform_attn_fused: value must be [B, S, M, D]": lambda v, r, o, z: (v[0], r, o, z),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    tensors, tables = make_small()
    with pytest.raises(ValueError) as error:
        call(tables, None)(*MISTAKES[message](*tensors))
    assert message in str(error.value)


def test_locations_and_weights_never_exist_in_memory():
    """Forward allocates only the output, and saves only the inputs for backward."""
    tensors, tables = make_small()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        call(tables, "cpu")(*leaves)
    assert set(saved) <= {tensor.data_ptr() for tensor in (*leaves, *tables)}
