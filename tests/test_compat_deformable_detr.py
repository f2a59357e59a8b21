# SPDX-License-Identifier: Apache-2.0
"""The functions of Deformable-DETR's ops package and of its compiled module, called as in that project."""

import pickle

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import vitkern
from vitkern.compat import deformable_detr as compat

SHAPES = torch.tensor([[6, 4], [3, 2]])
STARTS = torch.tensor([0, 24])


def make(batch=2, dtype=torch.float32, channels=8):
    torch.manual_seed(3)
    value = torch.randn(batch, 30, 2, channels, dtype=dtype)
    locations = torch.rand(batch, 5, 2, 2, 3, 2, dtype=dtype)
    weights = torch.rand(batch, 5, 2, 2, 3, dtype=dtype)
    return value, SHAPES, STARTS, locations, weights


def leaves(inputs):
    return [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]


def formula(inputs):
    value, shapes, _, locations, weights = inputs
    return compat.ms_deform_attn_core_pytorch(value, shapes, locations, weights)


class TheirFunction(Function):
    """Deformable-DETR's autograd function, on the two compiled functions."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return compat.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        value, locations, weights = compat.ms_deform_attn_backward(
            *ctx.saved_tensors, grad_output, ctx.im2col_step
        )
        return value, None, None, locations, weights, None


@pytest.mark.parametrize("function", [TheirFunction, compat.MSDeformAttnFunction])
@pytest.mark.parametrize("batch", [2, 65])
def test_functions_give_the_formula_and_its_gradients(function, batch):
    """A batch size that im2col_step does not divide gives the right results too."""
    ours, theirs = leaves(make(batch)), leaves(make(batch))
    output, expected = function.apply(*ours, 64), formula(theirs)
    torch.testing.assert_close(output, expected)
    seed = torch.randn_like(expected)
    output.backward(seed)
    expected.backward(seed)
    for position in (0, 3, 4):
        torch.testing.assert_close(ours[position].grad, theirs[position].grad)


@pytest.mark.parametrize("function", [TheirFunction, compat.MSDeformAttnFunction])
def test_gradcheck(function):
    inputs = leaves(make(1, torch.float64, channels=2))
    assert torch.autograd.gradcheck(lambda *tensors: function.apply(*tensors, 1), inputs)


def test_gradients_where_no_kernel_runs(monkeypatch):
    grad_output = torch.randn(2, 5, 16)
    expected = compat.ms_deform_attn_backward(*make(), grad_output, 64)
    monkeypatch.setattr(compat.backends, "choose", lambda *_: "reference")
    for ours, other in zip(compat.ms_deform_attn_backward(*make(), grad_output, 64), expected):
        torch.testing.assert_close(ours, other)


def test_compiled_functions_know_neither_autograd_nor_autocast():
    value, *others = leaves(make())
    with torch.autocast("cpu", torch.bfloat16):
        output = compat.ms_deform_attn_forward(value, *others, 64)
        assert output.dtype == torch.float32 and not output.requires_grad
        assert compat.MSDeformAttnFunction.apply(value, *others, 64).dtype == torch.bfloat16


def test_values_in_16_bits_with_locations_in_32():
    value, shapes, starts, locations, weights = make()
    inputs = (value.half(), shapes, starts, locations, weights)
    output = compat.ms_deform_attn_forward(*inputs, 64)
    gradients = compat.ms_deform_attn_backward(*inputs, torch.ones_like(output), 64)
    assert output.dtype == torch.float16
    assert [gradient.dtype for gradient in gradients] == [torch.float16, torch.float32, torch.float32]


def test_the_formula_runs_no_kernel(monkeypatch):
    monkeypatch.setattr(compat, "ms_deform_attn", None)
    monkeypatch.setattr(compat.functional, "ms_deform_attn", None)
    assert formula(make()).shape == (2, 5, 16)


def test_the_module_is_ours_and_the_functions_travel():
    assert compat.MSDeformAttn is vitkern.nn.MSDeformAttn
    assert compat.MSDeformAttn(256, 4, 8, 4).n_points == 4
    for name in compat.__all__:
        assert pickle.loads(pickle.dumps(getattr(compat, name))) is getattr(compat, name)


def test_what_is_wrong_is_named():
    value, shapes, starts, locations, weights = make()
    with pytest.raises(ValueError, match="attention_weights must be"):
        compat.ms_deform_attn_forward(value, shapes, starts, locations, weights[:, :4], 64)
