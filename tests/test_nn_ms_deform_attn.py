# SPDX-License-Identifier: Apache-2.0
"""nn.MSDeformAttn: the arguments that a drop-in replacement must accept, and the ones that it refuses."""

import copy
import io

import pytest
import torch

import vitkern
from vitkern.nn import MSDeformAttn

SHAPES = torch.tensor([[6, 5], [3, 2]])
STARTS = torch.tensor([0, 30])
PIXELS = 36


def module(**changes) -> MSDeformAttn:
    layer = MSDeformAttn(**{"d_model": 32, "n_levels": 2, "n_heads": 4, "n_points": 3, **changes})
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.3)
    return layer


def inputs(batch=2, queries=5, channels=32):
    return (
        torch.randn(batch, queries, channels),
        torch.rand(batch, queries, 2, 2),
        torch.randn(batch, PIXELS, channels),
    )


def by_the_book(layer, query, reference_points, pixels, mask=None):
    """The module's formula in plain torch and the reference."""
    heads, levels, points = layer.n_heads, layer.n_levels, layer.n_points
    value = layer.value_proj(pixels)
    if mask is not None:
        value = value * ~mask[..., None]
    offsets = layer.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
    weights = layer.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
    if reference_points.shape[-1] == 2:
        locations = reference_points[:, :, None, :, None] + offsets / SHAPES.flip(-1)[:, None]
    else:
        box = reference_points[:, :, None, :, None]
        locations = box[..., :2] + offsets / points * box[..., 2:] * 0.5
    from vitkern import ms_deform_attn

    value = value.unflatten(-1, (heads, -1))
    weights = weights.unflatten(-1, (levels, points))
    return layer.output_proj(ms_deform_attn(value, SHAPES, STARTS, locations, weights, backend="reference"))


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "reference_shape",
    [(2, 5, 2, 2), (1, 5, 1, 2), (2, 5, 1, 2), (1, 5, 2, 2), (2, 5, 2, 4), (2, 5, 1, 4), (1, 5, 1, 4)],
    ids=str,
)
def test_reference_points_and_boxes_broadcast_over_batch_and_level(reference_shape, ratio):
    layer = module(ratio=ratio)
    query, _, pixels = inputs()
    reference_points = torch.rand(reference_shape)
    actual = layer(query, reference_points, pixels, SHAPES, STARTS)
    torch.testing.assert_close(
        actual, by_the_book(layer, query, reference_points, pixels), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("reference_shape", [(2, 5, 2, 2), (1, 5, 1, 4)], ids=str)
def test_sampling_points_are_those_of_forward(reference_shape):
    layer, (query, _, pixels), points = module(), inputs(), torch.rand(reference_shape)
    locations, weights = layer.sampling_points(query, points, pixels, SHAPES, STARTS)
    assert locations.shape == (2, 5, 4, 2, 3, 2)
    value = layer.value_proj(pixels).unflatten(-1, (4, -1))
    output = layer.output_proj(vitkern.ms_deform_attn(value, SHAPES, STARTS, locations, weights))
    torch.testing.assert_close(output, layer(query, points, pixels, SHAPES, STARTS), rtol=1e-4, atol=1e-5)


def test_padding_is_true_and_counts_as_zero():
    layer = module()
    query, reference_points, pixels = inputs()
    mask = torch.rand(2, PIXELS) > 0.7
    torch.nn.init.normal_(layer.value_proj.bias)
    actual = layer(query, reference_points, pixels, SHAPES, STARTS, mask)
    torch.testing.assert_close(
        actual, by_the_book(layer, query, reference_points, pixels, mask), atol=1e-5, rtol=1e-5
    )


def test_levels_may_be_given_as_plain_numbers_and_starts_left_out():
    layer = module()
    query, reference_points, pixels = inputs()
    expected = layer(query, reference_points, pixels, SHAPES, STARTS)
    assert torch.equal(layer(query, reference_points, pixels, SHAPES), expected)
    assert torch.equal(layer(query, reference_points, pixels, [(6, 5), (3, 2)]), expected)
    assert torch.equal(layer(query, reference_points, pixels, SHAPES.int(), STARTS.int()), expected)


def test_any_batch_size_whatever_im2col_step_says():
    layer = module(im2col_step=64)
    assert layer(*inputs(batch=65), SHAPES, STARTS).shape == (65, 5, 32)
    assert layer(*inputs(batch=0), SHAPES, STARTS).shape == (0, 5, 32)


def test_every_parameter_learns():
    layer = module()
    query, reference_points, pixels = inputs()
    query.requires_grad_()
    reference_points.requires_grad_()
    pixels.requires_grad_()
    layer(query, reference_points, pixels, SHAPES, STARTS).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    for tensor in (query, reference_points, pixels):
        assert tensor.grad.abs().sum() > 0


def test_survives_deepcopy_and_pickle():
    layer = module()
    arguments = (*inputs(), SHAPES, STARTS)
    expected = layer(*arguments)
    assert torch.equal(copy.deepcopy(layer)(*arguments), expected)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module_with_float32_reference_points(dtype):
    layer = module()
    query, reference_points, pixels = inputs()
    expected = layer(query, reference_points, pixels, SHAPES, STARTS)
    actual = layer.to(dtype)(query.to(dtype), reference_points, pixels.to(dtype), SHAPES, STARTS)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)


def test_meta_device_construction_and_forward():
    with torch.device("meta"):
        layer = MSDeformAttn(32, 2, 4, 3)
        output = layer(
            torch.empty(2, 5, 32),
            torch.empty(1, 5, 1, 2),
            torch.empty(2, PIXELS, 32),
            torch.empty(2, 2).long(),
        )
    assert output.shape == (2, 5, 32)


@pytest.mark.parametrize(
    "message, make",
    [
        ("divisible by n_heads", lambda: MSDeformAttn(30, 2, 4, 3)),
        ("must be at least 1, got 2, 4 and 0", lambda: MSDeformAttn(32, 2, 4, 0)),
        ("must be at least 1, got 2, 0 and 3", lambda: MSDeformAttn(32, 2, 0, 3)),
        ("ratio", lambda: MSDeformAttn(32, 2, 4, 3, ratio=0.3)),
        ("2 or 4. with B=2, Q=5, L=2, got", lambda: module()(*_with_reference(3), SHAPES, STARTS)),
        ("S=36 pixels", lambda: module()(*inputs(), torch.tensor([[6, 5], [3, 3]]), STARTS)),
    ],
)
def test_what_it_refuses(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def _with_reference(numbers):
    query, _, pixels = inputs()
    return query, torch.rand(2, 5, 2, numbers), pixels
