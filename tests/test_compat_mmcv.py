# SPDX-License-Identifier: Apache-2.0
"""mmcv's layer, function and compiled functions, compared with Deformable-DETR's, which have tests of their own."""

import pytest
import torch

from tests.test_compat_deformable_detr import SHAPES, STARTS, make
from vitkern.compat import deformable_detr, mmcv
from vitkern.compat import layers as replacements
from vitkern.nn import MSDeformAttn

ROUND = dict(spatial_shapes=SHAPES, level_start_index=STARTS)


def layers(**options):
    """A layer of mmcv's kind and one of Deformable-DETR's with the same parameters."""
    layer = mmcv.MultiScaleDeformableAttention(16, 2, 2, 3, dropout=0.0, **options)
    plain = MSDeformAttn(16, 2, 2, 3, ratio=options.get("value_proj_ratio", 1.0))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def tensors(batch_first=True, reference=2):
    query, position, value = (torch.randn(2, count, 16) for count in (5, 5, 30))
    points, mask = torch.rand(2, 5, 2, reference), torch.rand(2, 30) < 0.3
    if not batch_first:
        query, position, value = (tensor.transpose(0, 1) for tensor in (query, position, value))
    return query, position, value, points, mask


def test_checkpoints_are_mmcvs():
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert list(mmcv.MultiScaleDeformableAttention().state_dict()) == names


@pytest.mark.parametrize("options", [{}, dict(value_proj_ratio=0.5), dict(batch_first=True)], ids=str)
@pytest.mark.parametrize("reference", [2, 4])
def test_layer_adds_position_before_and_identity_after(options, reference):
    layer, plain = layers(**options)
    first = layer.batch_first
    query, position, value, points, mask = tensors(first, reference)
    output = layer(query, None, value, None, position, mask, points, SHAPES, STARTS)

    def batch_in_front(tensor):
        return tensor if first else tensor.transpose(0, 1)

    query, position, value = map(batch_in_front, (query, position, value))
    expected = plain(query + position, points, value, SHAPES, STARTS, mask) + query
    torch.testing.assert_close(batch_in_front(output), expected)


def test_identity_under_either_name_and_value_from_query():
    layer, _ = layers(batch_first=True)
    query, points, identity = torch.randn(2, 30, 16), torch.rand(2, 30, 2, 2), torch.randn(2, 30, 16)
    around = dict(reference_points=points, **ROUND)
    expected = layer(query, value=query, identity=torch.zeros(()), **around) + identity
    torch.testing.assert_close(layer(query, identity=identity, **around), expected)
    with pytest.warns(DeprecationWarning, match='it is called "identity" now'):
        torch.testing.assert_close(layer(query, residual=identity, **around), expected)
    with pytest.raises(TypeError, match="give one of them"):
        layer(query, identity=identity, residual=identity, **around)


def test_dropout_leaves_the_identity():
    layer = mmcv.MultiScaleDeformableAttention(16, 2, 2, 3, dropout=1.0, batch_first=True)
    query, _, value, points, _ = tensors()
    torch.testing.assert_close(layer(query, value=value, reference_points=points, **ROUND), query)
    assert not torch.equal(layer.eval()(query, value=value, reference_points=points, **ROUND), query)


def test_groundingdino_adds_nothing():
    layer, plain = layers()
    query, position, value, points, mask = tensors(batch_first=False)
    output = replacements.mmcv(
        False,
        layer,
        query,
        value=value,
        query_pos=position,
        key_padding_mask=mask,
        reference_points=points,
        **ROUND,
    )
    query, position, value = (tensor.transpose(0, 1) for tensor in (query, position, value))
    expected = plain(query + position, points, value, SHAPES, STARTS, mask)
    torch.testing.assert_close(output.transpose(0, 1), expected)


def test_the_op_names_what_is_missing():
    layer, _ = layers(batch_first=True)
    query, _, value, points, _ = tensors()
    with pytest.raises(TypeError, match="reference_points must be a tensor, got NoneType"):
        layer(query, value=value, **ROUND)
    with pytest.raises(TypeError, match="spatial_shapes must be .* got None"):
        layer(query, value=value, reference_points=points)
    with pytest.raises(ValueError, match="divisible"):
        mmcv.MultiScaleDeformableAttention(256, 7)


def test_compiled_functions_fill_what_they_are_given():
    inputs = make()
    output = mmcv.ms_deform_attn_forward(*inputs, im2col_step=64)
    expected = deformable_detr.ms_deform_attn_backward(*inputs, torch.ones_like(output))
    filled = [torch.full_like(inputs[position], torch.nan) for position in (0, 3, 4)]
    assert mmcv.ms_deform_attn_backward(*inputs, torch.ones_like(output), *filled, im2col_step=64) is None
    for ours, gradient in zip(filled, expected):
        torch.testing.assert_close(ours, gradient)


def test_im2col_step_may_be_a_tensor():
    output = mmcv.MultiScaleDeformableAttnFunction.apply(*make(3), torch.tensor(64))
    value, shapes, _, locations, weights = make(3)
    expected = mmcv.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    torch.testing.assert_close(output, expected)


def test_initialisation_is_repeatable_and_mmengine_leaves_it_alone():
    layer = mmcv.MultiScaleDeformableAttention(16, 2, 2, 3)
    before = layer.sampling_offsets.bias.clone()
    layer.sampling_offsets.bias.data.zero_()
    layer.init_weights()
    assert torch.equal(layer.sampling_offsets.bias, before) and layer.is_init
