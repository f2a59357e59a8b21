# SPDX-License-Identifier: Apache-2.0
"""The reference compared with the definition in scalars, with grid_sample, and with finite differences."""

import math

import pytest
import torch

from tests.helpers import gradients
from vitkern import reference
from vitkern.cases import ATTENTION_CASES, MsDeformAttnCase, make_inputs

CASE = MsDeformAttnCase("small", "", 2, ((5, 7), (3, 2), (1, 4)), 6, 3, 4, 2)


def by_definition(value, shapes, starts, locations, weights, points_per_level, method):
    """The formulas, one number at a time."""
    batch, _, heads, channels = value.shape
    output = torch.zeros(batch, locations.shape[1], heads, channels, dtype=torch.float64)

    def pixel(b, m, level, row, column):
        height, width = shapes[level].tolist()
        if not (0 <= row < height and 0 <= column < width):
            return torch.zeros(channels, dtype=torch.float64)
        return value[b, int(starts[level]) + row * width + column, m]

    for b, q, m in torch.cartesian_prod(*(torch.arange(n) for n in output.shape[:3])).tolist():
        first = 0
        for level, points in enumerate(points_per_level):
            height, width = shapes[level].tolist()
            for k in range(first, first + points):
                x, y = (locations[b, q, m, k] * torch.tensor([width, height])).tolist()
                if method == "nearest":
                    column, row = (
                        min(max(math.floor(c + 0.5), 0), n - 1) for c, n in ((x, width), (y, height))
                    )
                    sample = pixel(b, m, level, row, column)
                else:
                    x, y = x - 0.5, y - 0.5
                    left, top = math.floor(x), math.floor(y)
                    sample = sum(
                        (1 - abs(x - column)) * (1 - abs(y - row)) * pixel(b, m, level, row, column)
                        for row in (top, top + 1)
                        for column in (left, left + 1)
                    )
                output[b, q, m] += weights[b, q, m, k] * sample
            first += points
    return output.flatten(2)


def flat(inputs):
    value, shapes, starts, locations, weights = inputs
    return value, shapes, starts, locations.flatten(3, 4), weights.flatten(3)


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("points_per_level", [(2, 2, 2), (0, 5, 1)])
def test_equals_the_definition(method, points_per_level):
    inputs = flat(make_inputs(CASE, locations="uniform", dtype=torch.float64))
    inputs = (*inputs[:3], inputs[3] * 1.6 - 0.3, inputs[4])  # some of them outside
    actual = reference.ms_deform_attn(*inputs, points_per_level, method)
    torch.testing.assert_close(actual, by_definition(*inputs, points_per_level, method), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(ATTENTION_CASES))
def test_equals_grid_sample_on_every_case(name):
    case = ATTENTION_CASES[name].shrunk()
    inputs = make_inputs(case, locations="uniform", dtype=torch.float64)
    inputs.sampling_locations = inputs.sampling_locations * 1.6 - 0.3

    def ours(value, locations, weights):
        arguments = (
            value,
            inputs.spatial_shapes,
            inputs.level_start_index,
            locations.flatten(3, 4),
            weights.flatten(3),
        )
        return reference.ms_deform_attn(*arguments, (case.points,) * len(case.levels))

    def theirs(value, locations, weights):
        return reference.ms_deform_attn_by_grid_sample(value, list(case.levels), locations, weights)

    for a, b in zip(gradients(ours, inputs.differentiable()), gradients(theirs, inputs.differentiable())):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_derivatives_of_first_and_second_order(method):
    case = MsDeformAttnCase("tiny", "", 1, ((3, 4), (2, 2)), 2, 2, 2, 2)
    value, shapes, starts, locations, weights = flat(
        make_inputs(case, locations="uniform", dtype=torch.float64)
    )

    def function(value, locations, weights):
        return reference.ms_deform_attn(value, shapes, starts, locations, weights, (2, 2), method)

    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    if method == "nearest":
        inputs[1].requires_grad_(False)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_nan_pixel_beside_the_border_does_not_leak_through_a_corner_outside():
    value = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    value[0, 1] = float("nan")  # 2 x 2 level, the pixel right of the one sampled at its left edge
    locations = torch.tensor([0.1, 0.25], dtype=torch.float64).view(1, 1, 1, 1, 2)
    shapes, starts, weights = (
        torch.tensor([[2, 2]]),
        torch.tensor([0]),
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
    )
    assert reference.ms_deform_attn(value, shapes, starts, locations, weights, (1,)).isfinite().all()
