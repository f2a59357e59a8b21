# SPDX-License-Identifier: Apache-2.0
"""token_project beyond its contract in test_contract.py: logits of any size, memory."""

from __future__ import annotations

import pytest
import torch

import vitkern
from vitkern.cases import TokenCase

SMALL = TokenCase("small", "", 2, 37, 24, 5)


def make(case, runner, dtype=torch.float32, *, keys=10, seed=0):
    return tuple(tensor.to(dtype) for tensor in case.make_project(keys=keys, device=runner.device, seed=seed))


def call(backend):
    return lambda *tensors: vitkern.token_project(*tensors, backend=backend)


@pytest.mark.parametrize("size", [30, 1e4, 1e30])
def test_logits_of_any_size(runner, size):
    """One token has by far the largest logit; then all logits are the same huge number, and the plain mean is added."""
    x, query, key, tokens = make(SMALL, runner)
    outputs = [call(backend)(x, query * size, key, tokens) for backend in (runner.backend, "reference")]
    torch.testing.assert_close(*outputs)
    output = call(runner.backend)(x, torch.full_like(query, size), torch.ones_like(key), tokens)
    torch.testing.assert_close(output, x + tokens.mean(1, keepdim=True))


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


def test_no_tensor_is_named():
    with pytest.raises(TypeError, match="token_project: key must be a tensor, got NoneType"):
        vitkern.token_project(
            torch.zeros(2, 9, 12), torch.zeros(2, 9, 4), None, torch.zeros(2, 3, 12), backend="cpu"
        )
