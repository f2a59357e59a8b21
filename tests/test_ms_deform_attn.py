# SPDX-License-Identifier: Apache-2.0
"""Every backend against the oracle in float64: outputs, each gradient, every dtype, every odd input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitkern
from tests.helpers import assert_matches_oracle, gradients, guarded_memory
from vitkern.cases import ATTENTION_CASES, MsDeformAttnCase, make_inputs, off_edge_inputs
from vitkern.check.examine import deterministic as deterministic_mode

NAMES = ("output", "grad_value", "grad_locations", "grad_weights")
LOW = (torch.float16, torch.bfloat16)


def make(case, runner, dtype, *, spread=1.4, coordinates=None, seed=0):
    """Uniform locations in and somewhat outside of the map, off the cell edges, in `dtype` on the runner's device."""
    if runner.tiny:  # every program costs seconds: one image and head are enough for its arithmetic
        case = replace(case, batch=min(case.batch, 1), heads=min(case.heads, 1))
    return off_edge_inputs(case, device=runner.device, seed=seed, spread=spread).to(dtype, coordinates)


def call(inputs, backend, **options):
    def function(value, locations, weights):
        levels = inputs.spatial_shapes, inputs.level_start_index
        return vitkern.ms_deform_attn(value, *levels, locations, weights, backend=backend, **options)

    return function


def check(inputs, runner, **options):
    ours, oracle = call(inputs, runner.backend, **options), call(inputs, "reference", **options)
    assert_matches_oracle(ours, oracle, inputs.differentiable(), NAMES)


def skip_dtype(runner, dtype):
    if dtype not in runner.dtypes:
        pytest.skip(f"{runner.backend} has no {dtype}")


SMALL = MsDeformAttnCase("small", "", 2, ((5, 7), (3, 4), (2, 1)), 9, 3, 16, 3)


def small(**changes) -> MsDeformAttnCase:
    return MsDeformAttnCase(**{**vars(SMALL), **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 30, 32, 64, 71])
def test_matches_the_oracle(runner, dtype, channels):
    skip_dtype(runner, dtype)
    check(make(small(channels=channels), runner, dtype), runner)


def dispatch(case):
    return case.channels, len(case.levels), case.points


@pytest.mark.parametrize("name", sorted(ATTENTION_CASES))
def test_matches_the_oracle_on_shapes_of_real_models(runner, name):
    first_of_its_kind = next(
        n for n in sorted(ATTENTION_CASES) if dispatch(ATTENTION_CASES[n]) == dispatch(ATTENTION_CASES[name])
    )
    if runner.slow and name != first_of_its_kind:
        pytest.skip(f"same dispatch as {first_of_its_kind}")
    check(make(ATTENTION_CASES[name].shrunk(), runner, torch.float32), runner)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_16_bit_values_with_float32_coordinates(runner, dtype):
    check(make(small(channels=32), runner, dtype, coordinates=torch.float32), runner)


@pytest.mark.parametrize(
    "value, coordinates", [(torch.float32, torch.float64), (torch.float32, torch.float16)]
)
def test_mixed_dtypes_give_gradients_in_the_dtype_of_each_input(runner, value, coordinates):
    inputs = make(SMALL, runner, value, coordinates=coordinates)
    actual = gradients(call(inputs, runner.backend), inputs.differentiable())
    assert [tensor.dtype for tensor in actual] == [value, value, coordinates, coordinates]
    exact = gradients(call(inputs, "reference"), tuple(t.double() for t in inputs.differentiable()))
    for a, e in zip(actual, exact):
        torch.testing.assert_close(a.double(), e, atol=3e-3 * e.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("points_per_level", [(3, 6, 3), (1, 0, 2), (0, 0, 5)])
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_levels_with_their_own_number_of_points(runner, dtype, points_per_level, method):
    inputs = make(small(points=sum(points_per_level)), runner, torch.float64)
    # The first level's points, spread over levels: edges are kept clear of for the finest grid only, so snap again.
    inputs.sampling_locations = _off_edges_of_their_level(inputs, points_per_level)
    inputs.attention_weights = inputs.attention_weights[:, :, :, 0].contiguous()
    inputs = inputs.to(dtype, torch.float32)
    check(inputs, runner, points_per_level=points_per_level, method=method)


def _off_edges_of_their_level(inputs, points_per_level):
    sizes = inputs.spatial_shapes.flip(-1).double()
    sizes = sizes.repeat_interleave(torch.tensor(points_per_level, device=sizes.device), 0)  # [K, 2]
    pixels = inputs.sampling_locations[:, :, :, 0] * sizes - 0.5
    cell = pixels.floor()
    return (cell + (pixels - cell).clamp(0.15, 0.85) + 0.5) / sizes


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nearest(runner, dtype):
    check(make(small(channels=32), runner, dtype, coordinates=torch.float32), runner, method="nearest")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nearest_locations_get_no_gradient_whatever_the_weights(runner, bad):
    inputs = make(small(channels=8), runner, torch.float32)
    inputs.attention_weights[:, 1] = bad
    leaves = inputs.differentiable()
    _, _, grad_locations, _ = gradients(call(inputs, runner.backend, method="nearest"), leaves)
    assert (grad_locations == 0).all()


NOT_FINITE = [float("nan"), float("inf"), float("-inf"), float("nan"), float("-inf")]
FAR = [1e30, -1e30, 3e37, -7.0, 1e9]


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_locations_add_nothing_and_get_no_gradient(runner, dtype, method):
    inputs = make(small(points=5), runner, dtype, coordinates=torch.float32, spread=0.9)
    not_finite, far = torch.tensor([NOT_FINITE, FAR], device=runner.device)
    locations = inputs.sampling_locations  # [B, Q, M, L, P, 2]
    locations[:, 1, :, :, :, 0] = not_finite
    locations[:, 2, :, :, :, 1] = not_finite
    locations[:, 3, :, 0] = far[:, None]
    locations[:, 4, :, :, :, 0] = far
    locations[:, 5, :, :, 2] = torch.tensor([1e-42, -1e-42])  # denormal: a location like any other
    check(inputs, runner, method=method)
    _, _, grad_locations, grad_weights = gradients(
        call(inputs, runner.backend, method=method), inputs.differentiable()
    )
    assert (grad_weights[:, 1:3] == 0).all()
    assert (grad_locations[:, 1:5, :, 0] == 0).all()


def test_locations_exactly_on_edges_and_centres(runner):
    inputs = make(small(levels=((4, 4), (2, 8), (1, 1)), points=4), runner, torch.float32)
    exact = torch.tensor([0.0, 1.0, -0.125, 0.125, 0.5, 0.375, 1.125, 0.875], device=runner.device)
    grid = torch.stack(torch.meshgrid(exact, exact, indexing="ij"), -1).flatten()
    size = inputs.sampling_locations.numel()
    inputs.sampling_locations = grid.repeat(size // grid.numel() + 1)[:size].view_as(
        inputs.sampling_locations
    )
    check(inputs, runner)


@pytest.mark.parametrize("pixel", range(6))
def test_nan_pixels_go_where_plain_torch_lets_them(runner, pixel):
    inputs = make(small(levels=((2, 3),), channels=5, points=2), runner, torch.float32)
    inputs.value[:, pixel] = float("nan")
    actual = call(inputs, runner.backend)(*inputs.differentiable())
    exact = call(inputs, "reference")(*inputs.differentiable())
    assert torch.equal(actual.isnan(), exact.isnan())
    assert exact.isnan().any()
    assert not exact.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_propagate(runner, bad):
    inputs = make(small(channels=8), runner, torch.float32)
    grad_output = torch.ones_like(call(inputs, "reference")(*inputs.differentiable()))
    grad_output[0, 2, 3] = bad
    actual = gradients(call(inputs, runner.backend), inputs.differentiable(), grad_output)
    exact = gradients(call(inputs, "reference"), inputs.differentiable(), grad_output)
    for name, a, e in zip(NAMES, actual, exact):
        assert torch.equal(a.isfinite(), e.isfinite()), name


EMPTIES = {
    "batch": dict(batch=0),
    "queries": dict(queries=0),
    "heads": dict(heads=0),
    "channels": dict(channels=0),
    "points": dict(points=0),
    "levels": dict(levels=()),
    "pixels": dict(levels=((0, 4), (3, 0))),
    "one level": dict(levels=((4, 3), (0, 5), (2, 2))),
}


@pytest.mark.parametrize("empty", EMPTIES)
def test_empty_inputs_give_empty_or_zero_results(runner, empty):
    inputs = make(small(**EMPTIES[empty]), runner, torch.float32)
    inputs.sampling_locations = inputs.sampling_locations.nan_to_num()
    check(inputs, runner)


# The empty level's size, first pixel and place among the levels; heads, and whether deterministic.
ANYWHERE = {
    "behind the pixels": ((0, 3), 21, 1, 3, False),
    "before the pixels": ((3, 0), -1, 0, 1, True),
    "in other pixels": ((0, 3), 2, 0, 3, True),
    "of a width beyond 32 bits": ((0, 2**32 + 3), 2**40, 1, 1, False),
    "of a height beyond 31 bits": ((2**31, 0), -(2**40), 0, 3, True),
}


@pytest.mark.parametrize("empty", ANYWHERE)
def test_an_empty_level_may_begin_anywhere(runner, empty):
    size, start, at, heads, deterministic = ANYWHERE[empty]
    levels = [(4, 4), (2, 2)]
    levels.insert(at, (0, 3))
    inputs = make(small(levels=tuple(levels), heads=heads, batch=1), runner, torch.float32)
    inputs.sampling_locations = inputs.sampling_locations.nan_to_num()
    inputs.spatial_shapes[at] = torch.tensor(size)
    inputs.level_start_index[at] = start
    inputs.attention_weights[:, 0, :, at] = float("nan")  # nothing is weighed
    with deterministic_mode(deterministic):
        check(inputs, runner)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_16_bit_locations_are_placed_in_float32(runner, dtype):
    """A location of 16 bits times 256 pixels is no number of 16 bits."""
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


def test_any_strides(runner):
    inputs = make(small(channels=6), runner, torch.float32)
    expected = gradients(call(inputs, runner.backend), inputs.differentiable())
    for name, tensor in vars(inputs).items():
        setattr(inputs, name, torch.stack([tensor] * 2, -1)[..., 1])
    assert not any(tensor.is_contiguous() for tensor in inputs)
    for name, a, e in zip(NAMES, gradients(call(inputs, runner.backend), inputs.differentiable()), expected):
        torch.testing.assert_close(a, e, msg=name)


def test_expanded_inputs_and_gradient(runner):
    inputs = make(small(batch=1), runner, torch.float32)
    value, locations, weights = (tensor.expand(3, *tensor.shape[1:]) for tensor in inputs.differentiable())
    output = call(inputs, runner.backend)(value, locations, weights)
    single = call(inputs, runner.backend)(*inputs.differentiable())
    torch.testing.assert_close(output, single.expand_as(output))
    leaves = [tensor.requires_grad_() for tensor in inputs.differentiable()]
    call(inputs, runner.backend)(*leaves).sum().backward()  # an expanded gradient, strides 0
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_the_gradients_that_are_asked_for(runner, wanted):
    inputs = make(SMALL, runner, torch.float32)
    everything = gradients(call(inputs, runner.backend), inputs.differentiable())[1:]
    leaves = [t.clone().requires_grad_(bool(want)) for t, want in zip(inputs.differentiable(), wanted)]
    output = call(inputs, runner.backend)(*leaves)
    with guarded_memory():
        output.backward(torch.ones_like(output))
    for leaf, gradient, want in zip(leaves, everything, wanted):
        assert (leaf.grad is not None) == bool(want)
        if want:
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_deterministic_backward_is_right_and_bitwise_repeatable(runner, dtype):
    skip_dtype(runner, dtype)
    inputs = make(small(channels=32, queries=5 if runner.tiny else 40), runner, dtype)
    with deterministic_mode(True):
        check(inputs, runner)
        first = gradients(call(inputs, runner.backend), inputs.differentiable())
        for _ in range(2 if runner.slow else 10):
            again = gradients(call(inputs, runner.backend), inputs.differentiable())
            assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("channels", [1, 2, 16, 30, 32, 64, 71])
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_gradcheck(runner, channels, deterministic):
    skip_dtype(runner, torch.float64)
    inputs = make(
        small(batch=1, levels=((4, 3), (2, 2)), queries=2, heads=2, channels=channels, points=2),
        runner,
        torch.float64,
    )
    leaves = tuple(tensor.requires_grad_() for tensor in inputs.differentiable())
    with deterministic_mode(deterministic):
        assert torch.autograd.gradcheck(
            call(inputs, runner.backend), leaves, fast_mode=runner.slow or channels > 32
        )


@given(
    batch=st.integers(1, 3),
    levels=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    queries=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33]),
    heads=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 96, 130]),
    points=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, *LOW]),
    spread=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_any_shape_on_the_cpu(batch, levels, queries, heads, channels, points, dtype, spread, seed):
    from tests.runners import RUNNERS

    runner = RUNNERS[0]
    case = MsDeformAttnCase("drawn", "", batch, tuple(levels), queries, heads, channels, points)
    check(make(case, runner, dtype, spread=spread, seed=seed), runner)


def test_threads_do_not_change_a_bit():
    from tests.runners import RUNNERS

    inputs = make(small(queries=70, channels=32), RUNNERS[0], torch.float32)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(gradients(call(inputs, "cpu"), inputs.differentiable()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
