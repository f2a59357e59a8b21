# SPDX-License-Identifier: Apache-2.0
"""token_project on every backend against the oracle in float64: each gradient, every dtype, every odd input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitkern
from tests.helpers import assert_matches_oracle, gradients, guarded_memory
from tests.runners import RUNNERS
from vitkern.cases import TOKEN_CASES, TokenCase

LOW = (torch.float16, torch.bfloat16)
NAMES = ("output", "grad_x", "grad_query", "grad_key", "grad_tokens")
SMALL = TokenCase("small", "", 2, 37, 24, 5)


def skip_dtype(runner, dtype):
    if dtype not in runner.dtypes:
        pytest.skip(f"{runner.backend} has no {dtype}")


def make(case, runner, dtype=torch.float32, *, keys=10, seed=0):
    return tuple(tensor.to(dtype) for tensor in case.make_project(keys=keys, device=runner.device, seed=seed))


def call(backend):
    return lambda *tensors: vitkern.token_project(*tensors, backend=backend)


def check(tensors, runner):
    assert_matches_oracle(call(runner.backend), call("reference"), tensors, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
def test_matches_the_oracle(runner, dtype):
    skip_dtype(runner, dtype)
    check(make(SMALL, runner, dtype), runner)


SIZES = [
    (1, 1, 1, 1, 1),
    (3, 5, 7, 2, 3),
    (1, 130, 33, 64, 20),
    (2, 65, 256, 16, 128),
    (1, 29, 130, 17, 1),
    (1, 40, 72, 65, 33),
]


@pytest.mark.parametrize("batch, pixels, channels, tokens, keys", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_size(runner, batch, pixels, channels, tokens, keys, dtype):
    check(make(TokenCase("any", "", batch, pixels, channels, tokens), runner, dtype, keys=keys), runner)


@pytest.mark.parametrize("name", sorted(TOKEN_CASES))
def test_matches_the_oracle_on_shapes_of_real_models(runner, name):
    case = TOKEN_CASES[name]
    if runner.slow and case.channels > 256:
        pytest.skip("too slow for a kernel that is emulated or interpreted")
    check(make(case.shrunk(), runner, keys=case.channels // 2), runner)


@pytest.mark.parametrize("sizes", [(0, 5, 8, 3), (2, 0, 8, 3), (2, 5, 0, 3), (2, 5, 8, 0)])
@pytest.mark.parametrize("keys", [0, 4])
def test_empty_inputs_give_empty_or_zero_results(runner, sizes, keys):
    check(make(TokenCase("empty", "", *sizes), runner, keys=keys), runner)


@pytest.mark.parametrize("size", [30, 1e4, 1e30])
def test_logits_of_any_size(runner, size):
    """One token stands out by far; then all logits are the same huge number, and what is added is the plain mean."""
    x, query, key, tokens = make(SMALL, runner)
    outputs = [call(backend)(x, query * size, key, tokens) for backend in (runner.backend, "reference")]
    torch.testing.assert_close(*outputs)
    output = call(runner.backend)(x, torch.full_like(query, size), torch.ones_like(key), tokens)
    torch.testing.assert_close(output, x + tokens.mean(1, keepdim=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(4))
def test_non_finite_numbers_go_where_torch_lets_them_go(runner, bad, where):
    tensors = make(SMALL, runner)
    tensors[where][1, 3, 2] = bad
    actual, plain = gradients(call(runner.backend), tensors), gradients(call("reference"), tensors)
    for name, a, p in zip(NAMES, actual, plain):
        assert torch.equal(a.isnan(), p.isnan()), name


def test_any_strides(runner):
    tensors = make(SMALL, runner)
    expected = gradients(call(runner.backend), tensors)
    strided = tuple(tensor.mT.contiguous().mT for tensor in tensors)
    assert not strided[0].is_contiguous()
    for name, a, e in zip(NAMES, gradients(call(runner.backend), strided), expected):
        torch.testing.assert_close(a, e, msg=name)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_that_are_asked_for(runner, wanted):
    tensors = make(SMALL, runner)
    everything = gradients(call(runner.backend), tensors)[1:]
    wants = [bool(wanted >> position & 1) for position in range(4)]
    leaves = [tensor.clone().requires_grad_(want) for tensor, want in zip(tensors, wants)]
    output = call(runner.backend)(*leaves)
    with guarded_memory():
        output.backward(torch.ones_like(output))
    for leaf, gradient, want in zip(leaves, everything, wants):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, gradient)


def test_the_attention_is_not_saved():
    leaves = [tensor.requires_grad_() for tensor in TokenCase("wide", "", 2, 500, 8, 16).make_project(keys=8)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        vitkern.token_project(*leaves, backend="cpu")
    assert 2 * 500 * 16 not in [tensor.numel() for tensor in saved]


@pytest.mark.parametrize("watched", [False, True])
def test_x_is_not_saved(watched):
    """Its gradient is grad_output, and nothing else depends on it."""
    leaves = [tensor.requires_grad_() for tensor in TokenCase("small", "", 2, 50, 8, 3).make_project(keys=4)]
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t),
        torch.autograd.profiler.profile(enabled=watched),
    ):
        output = vitkern.token_project(*leaves, backend="cpu")
    assert set(saved) == {leaf.data_ptr() for leaf in leaves[1:]}
    torch.autograd.backward(output, output.detach())
    assert torch.equal(leaves[0].grad, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_is_bitwise_repeatable(runner, dtype):
    tensors = make(TokenCase("wide", "", 2, 200, 48, 16), runner, dtype)
    first = gradients(call(runner.backend), tensors)
    for _ in range(2 if runner.slow else 10):
        again = gradients(call(runner.backend), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("tokens", [1, 3, 16, 20])
def test_gradcheck(runner, tokens):
    skip_dtype(runner, torch.float64)
    tensors = make(TokenCase("check", "", 2, 5, 6, tokens), runner, torch.float64, keys=4)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(call(runner.backend), leaves, fast_mode=runner.slow)


@given(
    batch=st.integers(1, 3),
    pixels=st.integers(1, 80),
    channels=st.integers(1, 70),
    tokens=st.integers(1, 70),
    keys=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, *LOW]),
    seed=st.integers(0, 999),
)
def test_any_shape_on_the_cpu(batch, pixels, channels, tokens, keys, dtype, seed):
    case = TokenCase("drawn", "", batch, pixels, channels, tokens)
    check(make(case, RUNNERS[0], dtype, keys=keys, seed=seed), RUNNERS[0])


def test_no_tensor_is_named():
    with pytest.raises(TypeError, match="token_project: key must be a tensor, got NoneType"):
        vitkern.token_project(
            torch.zeros(2, 9, 12), torch.zeros(2, 9, 4), None, torch.zeros(2, 3, 12), backend="cpu"
        )
