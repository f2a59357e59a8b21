# SPDX-License-Identifier: Apache-2.0
"""token_pool beyond its contract in test_contract.py: logits of any size, and the attention."""

from __future__ import annotations

import pytest
import torch

import vitkern
from tests.helpers import assert_as_exact_as, gradients
from vitkern.cases import TokenCase
from vitkern.ops.plain import in_its_own_dtype

LOW = (torch.float16, torch.bfloat16)
NAMES = ("output", "grad_x", "grad_weight")
SMALL = TokenCase("small", "", 2, 37, 24, 5)


def make(case, runner, dtype=torch.float32, *, recurrent=False, seed=0):
    x, weight = case.make_pool(recurrent=recurrent, device=runner.device, seed=seed)
    return x.to(dtype), weight.to(dtype)


def call(backend):
    return lambda x, weight: vitkern.token_pool(x, weight, backend=backend)


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_logits_of_any_size(runner, size):
    """One pixel has by far the largest logit; then all logits are the same huge number, and tokens are plain means."""
    x, weight = torch.zeros(2, 90, 4, device=runner.device), torch.zeros(3, 4, device=runner.device)
    weight[:, 0] = 1.0
    x[:, :, 0] = torch.linspace(0, size, 90)
    x[:, :, 1:] = torch.randn(2, 90, 3)
    outputs = [call(backend)(x, weight) for backend in (runner.backend, "reference")]
    torch.testing.assert_close(*outputs)
    x[:, :, 0] = size
    tokens = call(runner.backend)(x, weight)
    torch.testing.assert_close(tokens, x.mean(1, keepdim=True).expand(2, 3, 4))


@pytest.mark.parametrize(
    "size, dtype", [(3000, torch.float32), *((3000, low) for low in LOW), (300, torch.float32)], ids=str
)
def test_gradients_where_one_pixel_is_nearly_all_of_a_token(runner, size, dtype):
    """The gradient of the weight is a nearly zero difference of huge numbers, which plain torch computes exactly."""
    x, weight = make(SMALL, runner, torch.float64)
    x, weight = (x * size).to(dtype), weight.to(dtype)
    grad_output = make(SMALL, runner, dtype, recurrent=True, seed=1)[1]
    tensors = (x, weight)
    actual, plain = (
        gradients(function, tensors, grad_output)
        for function in (call(runner.backend), in_its_own_dtype(call("reference")))
    )
    exact = gradients(call("reference"), tuple(t.double() for t in tensors), grad_output.double())
    dots = (grad_output.double() @ x.double().mT).abs().max().item()  # of eq. (6), rounded to float
    eps = torch.finfo(torch.float32).eps
    extra_tolerance = (0.0, eps * dots * weight.abs().max().item(), eps**2 * dots * x.abs().max().item())
    for name, a, p, e, grant in zip(NAMES, actual, plain, exact, extra_tolerance):
        assert_as_exact_as(a, p, e, what=name, extra_tolerance=grant)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_beyond_what_16_bits_hold(runner, autocast):
    x, weight = (
        torch.full((1, 3, 64), 60.0, device=runner.device),
        torch.full((2, 64), 60.0, device=runner.device),
    )
    x[0, 1] *= 0.5
    tensors = (x, weight) if autocast else (x.half(), weight.half())
    for backend in (runner.backend, "reference"):
        with torch.autocast(runner.device, torch.float16, enabled=autocast):
            tokens = call(backend)(*tensors)
        assert torch.equal(tokens, x[:, :1].expand(1, 2, 64).half()), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_logits_whose_rounding_is_huge(runner, dtype):
    """Backward may sum a logit in another order than forward and get more than the saved largest logit."""
    if runner.backend == "triton" and dtype is torch.float64:
        pytest.skip("triton takes no float64")
    x, weight = make(TokenCase("rounding", "", 3, 1, 35, 17), runner, dtype)
    for gradient in gradients(call(runner.backend), (x * 1e12, weight * 1e12)):
        assert gradient.isfinite().all()


def test_the_largest_logits_come_last(runner):
    """Each block of pixels has much larger logits than the blocks before it."""
    x, weight = make(TokenCase("rising", "", 1, 200, 8, 4), runner)
    x[:, :, 0] = torch.arange(200.0)
    weight[:, 0] = torch.tensor([1.0, 5.0, -5.0, 0.01])
    actual = gradients(call(runner.backend), (x, weight))
    exact = gradients(call("reference"), (x.double(), weight.double()))
    for name, a, e in zip(NAMES, actual, exact):
        # Logits, up to 1000 here, are rounded to floats: so exact exponents are.
        atol = 1000 * torch.finfo(torch.float32).eps * e.abs().max().item()
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol, msg=name)


def test_one_pixel_is_every_token(runner):
    x, weight = make(TokenCase("pixel", "", 2, 1, 24, 5), runner)
    output, grad_x, grad_weight = gradients(call(runner.backend), (x, weight))
    assert torch.equal(output, x.expand_as(output))
    torch.testing.assert_close(grad_x, torch.full_like(x, 5))
    torch.testing.assert_close(grad_weight, torch.zeros_like(weight), atol=1e-4, rtol=0)


def test_the_attention_is_not_saved():
    leaves = [tensor.requires_grad_() for tensor in TokenCase("wide", "", 2, 500, 8, 16).make_pool()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        vitkern.token_pool(*leaves, backend="cpu")
    assert 2 * 500 * 16 not in [tensor.numel() for tensor in saved]


def test_attention_is_that_of_the_tokens(runner):
    x, weight = make(SMALL, runner)
    tokens, attention = vitkern.token_pool(x, weight, return_attention=True, backend=runner.backend)
    assert attention.shape == (2, 37, 5)
    torch.testing.assert_close(attention.sum(1), torch.ones(2, 5, device=runner.device))
    torch.testing.assert_close(attention.mT @ x, tokens)


def test_attention_too_is_of_the_weight_in_the_dtype_of_x():
    x, weight = torch.tensor([[[0.0], [4.0]]]).bfloat16(), torch.full((1, 1), 1.0039)  # 1 in bfloat16
    _, attention = vitkern.token_pool(x, weight, return_attention=True)
    _, expected = vitkern.token_pool(x, weight.bfloat16(), return_attention=True)
    assert torch.equal(attention, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_of_logits_beyond_float16(autocast):
    x, weight = torch.full((1, 3, 64), 60.0), torch.full((2, 64), 60.0)
    x[0, 1] *= 0.5
    if not autocast:
        x, weight = x.half(), weight.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        tokens, attention = vitkern.token_pool(x, weight, return_attention=True)
    assert attention.dtype == tokens.dtype == torch.float16
    assert attention[0].tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]


def test_no_tensor_is_named():
    with pytest.raises(TypeError, match="token_pool: weight must be a tensor, got NoneType"):
        vitkern.token_pool(torch.zeros(2, 9, 12), None, backend="cpu")
