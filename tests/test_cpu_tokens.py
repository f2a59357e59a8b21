# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels' own parts for pixels and tokens: splitting pixels into parts, and merging the parts.

The contract of all backends is in tests/test_contract.py.
"""

from __future__ import annotations

import pytest
import torch

import vitkern
from tests.helpers import assert_right, gradients
from tests.runners import RUNNERS
from vitkern.cases import TokenCase

OPS = {
    "token_pool": lambda *tensors, backend: vitkern.token_pool(*tensors, backend=backend),
    "token_project": lambda *tensors, backend: vitkern.token_project(*tensors, backend=backend),
}
# Whole and broken blocks; an image in one part, in several, and in as many as there can be.
SPLITS = {
    "part": (8, 250, 64, 16),
    "parts": (2, 1100, 40, 5),
    "parts-of-few-images": (1, 250, 64, 16),
    "most-parts": (1, 40000, 3, 2),
    "blocks-of-few-pixels": (1, 290, 2100, 3),
}


@pytest.fixture(params=[pytest.param(r, id=r.name, marks=r.marks) for r in RUNNERS if r.backend == "cpu"])
def isa(request):
    with request.param.active():
        yield


def make(op, sizes, dtype=torch.float32):
    case = TokenCase("split", "", *sizes)
    tensors = case.make_pool() if op == "token_pool" else case.make_project(keys=12)
    return tuple(tensor.to(dtype) for tensor in tensors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(isa, op, split, dtype):
    tensors, results = make(op, SPLITS[split], dtype), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(gradients(lambda *inputs: OPS[op](*inputs, backend="cpu"), tensors))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_way_to_split_matches_the_oracle(isa, op, split):
    assert_right(
        op, TokenCase("split", "", *SPLITS[split]), **({"keys": 12} if op == "token_project" else {})
    )


@pytest.mark.parametrize("pixel", [0, 600, 1099])
@pytest.mark.parametrize("logit", [-float("inf"), float("inf"), float("nan"), 1e30])
def test_one_part_does_to_the_others_what_torch_does(isa, pixel, logit):
    """A logit of the first, a middle or the last part removes its pixel, all other pixels, or makes everything NaN."""
    x, weight = make("token_pool", SPLITS["parts"])
    weight[:, 0] = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    x[0, pixel, 0] = logit
    ours, plain = (
        gradients(lambda *inputs, to=backend: OPS["token_pool"](*inputs, backend=to), (x, weight))
        for backend in ("cpu", "reference")
    )
    for name, a, p in zip(("tokens", "grad_x", "grad_weight"), ours, plain):
        assert torch.equal(a.isnan(), p.isnan()), name
    torch.testing.assert_close(ours[0], plain[0], equal_nan=True)


def test_parts_without_any_weight_leave_no_trace(isa):
    """All logits of the first and of a middle part are -inf."""
    x, weight = make("token_pool", (1, 1100, 8, 3))
    weight[:, 0], x[:, :, 0] = 0, 0
    x[:, :300, 0], x[:, 600:900, 0] = -3e38, -3e38
    weight[:, 0] = 3e38
    expected = vitkern.token_pool(x, weight, backend="reference")
    torch.testing.assert_close(vitkern.token_pool(x, weight, backend="cpu"), expected)
