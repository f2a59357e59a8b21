# SPDX-License-Identifier: Apache-2.0
"""Calls that ms_deform_attn refuses with a message that names the argument, the expected value and the actual one."""

import pytest
import torch

import vitkern
from tests.test_torch_citizenship import attend, make

MISTAKES = {
    "value must be [B, S, M, D]": lambda i: {"value": i.value[0]},
    "S=36 pixels": lambda i: {
        "spatial_shapes": i.spatial_shapes + 1,
        "level_start_index": torch.tensor([0, 42]),
    },
    "without gap or overlap": lambda i: {"level_start_index": torch.tensor([0, 6])},
    "spatial_shapes must be [L, 2]": lambda i: {"spatial_shapes": i.spatial_shapes.flatten()},
    "level_start_index must be [L] with L=2": lambda i: {"level_start_index": torch.tensor([0])},
    "with B=2, M=2, L=2, got [2, 5, 2, 1, 3, 2]": lambda i: {
        "sampling_locations": i.sampling_locations[:, :, :, :1]
    },
    "got [1, 5, 2, 2, 3, 2]": lambda i: {"sampling_locations": i.sampling_locations[:1]},
    "attention_weights must be [2, 5, 2, 2, 3]": lambda i: {
        "attention_weights": i.attention_weights[..., :2]
    },
    "method must be 'bilinear' or 'nearest', got 'cubic'": lambda i: {"method": "cubic"},
    "points_per_level must be L=2 numbers": lambda i: {
        "points_per_level": [6],
        "sampling_locations": i.sampling_locations.flatten(3, 4),
    },
    "K=7 points in all": lambda i: {
        "points_per_level": [4, 3],
        "sampling_locations": i.sampling_locations.flatten(3, 4),
    },
    "at most 65535 points in all": lambda i: {
        "points_per_level": [1, 2**16],
        "sampling_locations": i.sampling_locations.new_zeros(2, 5, 2, 1 + 2**16, 2),
        "attention_weights": i.attention_weights.new_zeros(2, 5, 2, 1 + 2**16),
    },
    "backend must be one of": lambda i: {"backend": "tpu"},
    "on value's device cpu, got meta": lambda i: {"attention_weights": i.attention_weights.to("meta")},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    inputs = make()
    arguments = {**vars(inputs), **MISTAKES[message](inputs)}
    with pytest.raises(ValueError) as error:
        vitkern.ms_deform_attn(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
def test_integer_tensors_are_refused(name, autocast):
    inputs = make(torch.float32)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match=name):
        vitkern.ms_deform_attn(**{**vars(inputs), name: getattr(inputs, name).long()})


TYPES = {
    "spatial_shapes must be an int64 tensor or pairs of whole numbers": lambda i: {
        "spatial_shapes": [(6, 5, 1), (3, 2, 1)]
    },
    "pairs of whole numbers, got [(6.0, 5), (3, 2)]": lambda i: {"spatial_shapes": [(6.0, 5), (3, 2)]},
    "spatial_shapes must be int64, got torch.float32": lambda i: {"spatial_shapes": i.spatial_shapes.float()},
    "level_start_index must be int64, got torch.float64": lambda i: {
        "level_start_index": i.level_start_index.double()
    },
    "level_start_index must be an int64 tensor or whole numbers, got [0.0, 30]": lambda i: {
        "level_start_index": [0.0, 30]
    },
    "points_per_level must be whole numbers, got 6": lambda i: {"points_per_level": 6},
    "value must be a tensor, got list": lambda i: {
        "value": i.value.tolist(),
        "spatial_shapes": [(6, 5), (3, 2)],
    },
    "value must be a tensor, got NoneType": lambda i: {"value": None},
    "value must be a dense tensor, got torch.sparse_coo": lambda i: {"value": i.value.to_sparse()},
    "attention_weights must be a dense tensor, got torch.sparse_coo": lambda i: {
        "attention_weights": i.attention_weights.to_sparse()
    },
    "sampling_locations must be a tensor, got list": lambda i: {
        "sampling_locations": i.sampling_locations.tolist()
    },
    "method must be a string, got list": lambda i: {"method": ["nearest"]},
    "backend must be a string or None, got list": lambda i: {"backend": ["cpu"]},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("message", TYPES)
def test_a_wrong_type_is_named(message, autocast):
    inputs = make()
    with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError) as error:
        vitkern.ms_deform_attn(**{**vars(inputs), **TYPES[message](inputs)})
    assert message in str(error.value)


def test_first_pixels_may_be_given_as_numbers():
    inputs = make()
    given = {**vars(inputs), "level_start_index": [0, 30]}
    assert torch.equal(vitkern.ms_deform_attn(**given), attend(*inputs))


@pytest.mark.parametrize(
    "grad_output, got",
    [
        (torch.ones(2, 5, 16), "torch.float32 on cpu"),
        (torch.ones(2, 5, 16, dtype=torch.float64, device="meta"), "torch.float64 on meta"),
        (torch.ones(2, 5, 8, dtype=torch.float64), r"\[2, 5, 8\] of torch.float64"),
    ],
    ids=["dtype", "device", "shape"],
)
def test_a_wrong_grad_output_is_named(grad_output, got):
    with pytest.raises(ValueError, match=f"ms_deform_attn: grad_output must be .*, got .*{got}"):
        torch.ops.vitkern.ms_deform_attn_backward(grad_output, (True, True, True), *make())
