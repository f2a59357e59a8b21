# SPDX-License-Identifier: Apache-2.0
"""ms_deform_attn beyond its contract in test_contract.py: arguments, and gradients that plain torch does not define."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vitkern
from tests.helpers import gradients
from vitkern.cases import MsDeformAttnCase, make_inputs, off_edge_inputs

NAMES = ("output", "grad_value", "grad_locations", "grad_weights")
LOW = (torch.float16, torch.bfloat16)


def make(case, runner, dtype):
    """Inputs with uniform locations in and slightly outside of the map, off the edges of cells."""
    if runner.tiny:  # every program costs seconds: one image and head are enough for its arithmetic
        case = replace(case, batch=min(case.batch, 1), heads=min(case.heads, 1))
    return off_edge_inputs(case, device=runner.device, seed=0).to(dtype)


def call(inputs, backend, **options):
    def function(value, locations, weights):
        levels = inputs.spatial_shapes, inputs.level_start_index
        return vitkern.ms_deform_attn(value, *levels, locations, weights, backend=backend, **options)

    return function


SMALL = MsDeformAttnCase("small", "", 2, ((5, 7), (3, 4), (2, 1)), 9, 3, 16, 3)


def small(**changes) -> MsDeformAttnCase:
    return MsDeformAttnCase(**{**vars(SMALL), **changes})


@pytest.mark.parametrize("as_given", [tuple, torch.tensor, iter], ids=lambda kind: kind.__name__)
def test_numbers_of_points_in_any_container(as_given):
    inputs = make_inputs(SMALL, locations="uniform", dtype=torch.float32)
    inputs.sampling_locations = inputs.sampling_locations.flatten(3, 4)
    inputs.attention_weights = inputs.attention_weights.flatten(3)
    points, *others = inputs.attention_weights.shape[3], *[0] * (len(inputs.spatial_shapes) - 2)
    points = [1, points - 1, *others]
    output = vitkern.ms_deform_attn(*inputs, points_per_level=as_given(points))
    assert torch.equal(output, vitkern.ms_deform_attn(*inputs, points_per_level=points))


def test_numbers_of_points_are_whole():
    inputs = make_inputs(SMALL, locations="uniform", dtype=torch.float32)
    with pytest.raises(TypeError):
        vitkern.ms_deform_attn(*inputs, points_per_level=[1.5] * len(inputs.spatial_shapes))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nearest_stays_in_a_level_whose_size_float32_rounds_up(backend):
    width = 2**24 + 4  # width - 1 is rounded to width
    value = torch.empty(1, width + 1, 1, 16)  # mostly untouched: takes no memory
    value[0, width - 1], value[0, width] = 1, 2
    locations, weights = torch.ones(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1)
    output = vitkern.ms_deform_attn(
        value,
        [(1, width), (1, 1)],
        None,
        locations,
        weights,
        points_per_level=[1, 0],
        method="nearest",
        backend=backend,
    )
    assert torch.equal(output, torch.ones(1, 1, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nearest_locations_get_no_gradient_whatever_the_weights(runner, bad):
    inputs = make(small(channels=8), runner, torch.float32)
    inputs.attention_weights[:, 1] = bad
    leaves = inputs.differentiable()
    _, _, grad_locations, _ = gradients(call(inputs, runner.backend, method="nearest"), leaves)
    assert (grad_locations == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_propagate(runner, bad):
    inputs = make(small(channels=8), runner, torch.float32)
    grad_output = torch.ones_like(call(inputs, "reference")(*inputs.differentiable()))
    grad_output[0, 2, 3] = bad
    actual = gradients(call(inputs, runner.backend), inputs.differentiable(), grad_output)
    exact = gradients(call(inputs, "reference"), inputs.differentiable(), grad_output)
    for name, a, e in zip(NAMES, actual, exact):
        assert torch.equal(a.isfinite(), e.isfinite()), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_16_bit_locations_are_placed_in_float32(runner, dtype):
    """The product of a 16-bit location and a width of 256 pixels does not fit 16 bits."""
    inputs = make(small(levels=((4, 256),)), runner, dtype)
    exact = call(inputs, "reference")(*(tensor.double() for tensor in inputs.differentiable()))
    once = torch.finfo(dtype).eps * exact.abs().max().item()
    for backend in (runner.backend, "reference"):
        actual = call(inputs, backend)(*inputs.differentiable()).double()
        torch.testing.assert_close(actual, exact, atol=once, rtol=0, msg=backend)


@pytest.mark.parametrize(
    "shapes, starts, said",
    [
        ([(2**32, 2**32), (1, 1)], None, "spatial_shapes must be of sizes whose pixels int64 can count"),
        ([(2**70, 1)], None, "spatial_shapes must be of sizes whose pixels int64 can count"),
        ([(5, 7)], [2**64], "level_start_index must be of numbers that int64 holds"),
    ],
)
def test_numbers_beyond_int64_are_refused_by_name(shapes, starts, said):
    locations, weights = torch.rand(1, 3, 1, len(shapes), 2, 2), torch.rand(1, 3, 1, len(shapes), 2)
    with pytest.raises(ValueError, match=f"ms_deform_attn: {said}, got"):
        vitkern.ms_deform_attn(torch.randn(1, 35, 1, 4), shapes, starts, locations, weights)
