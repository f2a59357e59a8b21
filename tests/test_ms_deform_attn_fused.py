# SPDX-License-Identifier: Apache-2.0
"""The fused form on every backend against the oracle in float64, and against the plain form that it fuses."""

from __future__ import annotations

import pytest
import torch

import vitkern
from tests.helpers import assert_as_exact_as, assert_matches_oracle, gradients, guarded_memory
from tests.test_ms_deform_attn import SMALL, dispatch, make, skip_dtype, small
from vitkern.cases import ATTENTION_CASES
from vitkern.check.examine import deterministic
from vitkern.ops.plain import in_its_own_dtype

NAMES = ("output", "grad_value", "grad_reference", "grad_offsets", "grad_logits")
FORMS = {  # shape of the reference points of B images, Q queries, L levels
    "points": lambda b, q, levels: (b, q, levels, 2),
    "points shared": lambda b, q, levels: (1, q, 1, 2),
    "boxes": lambda b, q, levels: (b, q, levels, 4),
    "boxes shared": lambda b, q, levels: (b, q, 1, 4),
}


def make_fused(case, runner, dtype, form="points", *, coordinates=None, ragged=None):
    """Reference points and offsets whose sum keeps off the cell edges: [value, reference, offsets, logits] and levels.

    Random reference points come first; offsets then lead from them to the places of the plain form's inputs.
    """
    inputs = make(case, runner, torch.float64)
    batch, queries, heads, levels, points = inputs.attention_weights.shape
    device = runner.device
    counts = torch.tensor(ragged or (points,) * levels, device=device)
    sizes = inputs.spatial_shapes.flip(-1).double()
    reference = (
        torch.rand(FORMS[form](batch, queries, levels), dtype=torch.float64, device=device) * 0.6 + 0.2
    )
    places = inputs.sampling_locations.flatten(3, 4)  # [B, Q, M, K, 2]
    if ragged:
        sizes_of_points = sizes.repeat_interleave(counts, 0)
        pixels = places[:, :, :, : sum(ragged)] * sizes_of_points - 0.5
        places = (pixels.floor() + (pixels - pixels.floor()).clamp(0.15, 0.85) + 0.5) / sizes_of_points
    of_points = reference.expand(-1, -1, levels, -1).repeat_interleave(counts, 2)[:, :, None]
    if reference.shape[-1] == 2:
        step = 1 / sizes.repeat_interleave(counts, 0)
    else:
        step = of_points[..., 2:] / (2 * counts.repeat_interleave(counts)[:, None])
    offsets = (places - of_points[..., :2]) / step
    logits = torch.randn(offsets.shape[:-1], dtype=torch.float64, device=device)
    if not ragged:
        offsets = offsets.unflatten(3, (levels, points))
    coordinates = coordinates or dtype
    tensors = [
        inputs.value.to(dtype),
        reference.to(coordinates),
        offsets.to(coordinates),
        logits.to(coordinates),
    ]
    return tensors, (inputs.spatial_shapes, inputs.level_start_index)


def call(tables, backend, **options):
    def function(value, reference, offsets, logits):
        return vitkern.ms_deform_attn_fused(
            value, *tables, reference, offsets, logits, backend=backend, **options
        )

    return function


def check(tensors, tables, runner, **options):
    ours, oracle = call(tables, runner.backend, **options), call(tables, "reference", **options)
    assert_matches_oracle(ours, oracle, tensors, NAMES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_the_oracle(runner, dtype, form):
    skip_dtype(runner, dtype)
    check(*make_fused(SMALL, runner, dtype, form), runner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_with_float32_coordinates(runner, dtype):
    check(*make_fused(small(channels=32), runner, dtype, coordinates=torch.float32), runner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_throughout(runner, dtype):
    """Outputs only: a rounded offset may lie beside a cell's edge, where the gradients of two precisions differ."""
    tensors, tables = make_fused(small(channels=32), runner, dtype)
    actual = call(tables, runner.backend)(*tensors)
    plain = in_its_own_dtype(call(tables, "reference"))(*tensors)
    exact = call(tables, "reference")(*(t.double() for t in tensors))
    assert_as_exact_as(actual, plain, exact, what="output")


@pytest.mark.parametrize("name", sorted(ATTENTION_CASES))
def test_matches_the_oracle_on_shapes_of_real_models(runner, name):
    first_of_its_kind = next(
        n for n in sorted(ATTENTION_CASES) if dispatch(ATTENTION_CASES[n]) == dispatch(ATTENTION_CASES[name])
    )
    if runner.slow and name != first_of_its_kind:
        pytest.skip(f"same dispatch as {first_of_its_kind}")
    check(*make_fused(ATTENTION_CASES[name].shrunk(), runner, torch.float32, "points shared"), runner)


@pytest.mark.parametrize("form", ["points", "boxes shared"])
@pytest.mark.parametrize("ragged", [(3, 6, 3), (1, 0, 2), (0, 0, 5)])
def test_levels_with_their_own_number_of_points(runner, ragged, form):
    tensors, tables = make_fused(small(points=sum(ragged)), runner, torch.float32, form, ragged=ragged)
    check(tensors, tables, runner, points_per_level=ragged)


@pytest.mark.parametrize("form", ["points", "boxes"])
def test_nearest(runner, form):
    check(*make_fused(small(channels=32), runner, torch.float32, form), runner, method="nearest")


def test_softmax_of_extreme_logits(runner):
    tensors, tables = make_fused(SMALL, runner, torch.float32)
    tensors[3][:, 0] *= 1e4
    tensors[3][:, 1, :, ::2] = -float("inf")
    tensors[3][:, 2] = 88.0
    tensors[3][:, 3] = -1e30
    check(tensors, tables, runner)


def test_offsets_that_are_not_finite_add_nothing_but_take_their_share(runner):
    tensors, tables = make_fused(SMALL, runner, torch.float32)
    tensors[2][:, 0, :, 0, 0] = float("nan")
    tensors[2][:, 1, :, :, 1, 0] = float("inf")
    tensors[2][:, 2] = 1e30
    check(tensors, tables, runner)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_boxes_and_offsets_that_lead_nowhere_get_no_gradient(runner, bad):
    """Eq. (12) has a product of the one in the gradient of the other, and 0 times infinity is no 0."""
    tensors, tables = make_fused(SMALL, runner, torch.float32, "boxes")
    _, boxes, offsets, _ = tensors
    boxes[:, 0, :, 2], boxes[:, 1, :, 3], offsets[:, 2] = bad, bad, bad
    check(tensors, tables, runner)
    for backend in (runner.backend, "reference"):
        _, _, grad_boxes, grad_offsets, _ = gradients(call(tables, backend), tensors)
        for gradient in (grad_boxes, grad_offsets):
            assert (gradient[:, :3] == 0).all(), backend
            assert (gradient[:, 3:] != 0).any(), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_boxes_are_widened_before_they_are_divided(runner, dtype):
    """By three points to a level, which rounds."""
    tensors, tables = make_fused(small(levels=((64, 64),)), runner, torch.float32, "boxes")
    tensors[1] = tensors[1].to(dtype)
    exact = call(tables, "reference")(*(t.double() for t in tensors))
    for backend in (runner.backend, "reference"):
        actual = call(tables, backend)(*tensors).double()
        torch.testing.assert_close(actual, exact, atol=1e-4, rtol=0, msg=backend)


def test_nan_logits_spread_over_their_query_and_head_only(runner):
    tensors, tables = make_fused(SMALL, runner, torch.float32)
    tensors[3][:, 0, 0, 1] = float("nan")
    actual = call(tables, runner.backend)(*tensors)
    exact = call(tables, "reference")(*tensors)
    assert torch.equal(actual.isnan(), exact.isnan())


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 1)])
def test_only_the_gradients_that_are_asked_for(runner, wanted):
    tensors, tables = make_fused(SMALL, runner, torch.float32, "boxes")
    everything = gradients(call(tables, runner.backend), tensors)[1:]
    leaves = [t.clone().requires_grad_(bool(want)) for t, want in zip(tensors, wanted)]
    output = call(tables, runner.backend)(*leaves)
    with guarded_memory():
        output.backward(torch.ones_like(output))
    for leaf, gradient, want in zip(leaves, everything, wanted):
        assert (leaf.grad is not None) == bool(want)
        if want:
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize(
    "empty",
    [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"points": 0}, {"levels": ((0, 4),)}, {"levels": ()}],
    ids=str,
)
def test_empty_inputs(runner, empty):
    case = small(**empty)
    inputs = make(case, runner, torch.float32)
    shape = inputs.attention_weights.shape
    reference = torch.rand(shape[0], shape[1], 1, 2, device=runner.device)
    offsets, logits = (
        torch.randn(*shape, 2, device=runner.device),
        torch.randn(shape, device=runner.device).flatten(3),
    )
    check(
        [inputs.value, reference, offsets, logits], (inputs.spatial_shapes, inputs.level_start_index), runner
    )


def test_deterministic_backward(runner):
    tensors, tables = make_fused(small(channels=32, queries=5 if runner.tiny else 40), runner, torch.float32)
    with deterministic(True):
        check(tensors, tables, runner)
        first, second = (gradients(call(tables, runner.backend), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("form", ["points shared", "boxes"])
def test_gradcheck(runner, form):
    skip_dtype(runner, torch.float64)
    case = small(batch=1, levels=((4, 3), (2, 2)), queries=2, heads=2, channels=4, points=2)
    tensors, tables = make_fused(case, runner, torch.float64, form)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(call(tables, runner.backend), leaves, fast_mode=runner.slow)


def test_is_softmax_and_locations_and_then_the_plain_form(runner):
    (value, reference, offsets, logits), tables = make_fused(SMALL, runner, torch.float32)
    locations = reference[:, :, None, :, None] + offsets / tables[0].flip(-1)[:, None]
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    plain = vitkern.ms_deform_attn(value, *tables, locations, weights, backend=runner.backend)
    fused = call(tables, runner.backend)(value, reference, offsets, logits)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def make_small():
    return make_fused(SMALL, _Cpu, torch.float64)


class _Cpu:
    device, tiny = "cpu", False


def test_opcheck_of_op_and_backward():
    tensors, tables = make_small()
    arguments = (tensors[0], *tables, *tensors[1:])
    for tensor in tensors:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.vitkern.ms_deform_attn_fused.default, arguments)
    grad_output = torch.randn(2, 9, 48, dtype=torch.float64)
    for needed in ([True] * 4, [False, True, False, True]):
        detached = tuple(argument.detach() for argument in arguments)
        torch.library.opcheck(
            torch.ops.vitkern.ms_deform_attn_fused_backward.default, (grad_output, needed, *detached)
        )


def test_compiles_without_a_graph_break():
    tensors, tables = make_small()
    function = call(tables, None)
    compiled = torch.compile(lambda *args: function(*args).sin(), fullgraph=True)
    for ours, eager in zip(
        gradients(compiled, tensors), gradients(lambda *args: function(*args).sin(), tensors)
    ):
        torch.testing.assert_close(ours, eager)


def test_a_second_derivative_is_refused():
    tensors, tables = make_small()
    value = tensors[0].requires_grad_()
    (gradient,) = torch.autograd.grad(call(tables, None)(*tensors).square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="ms_deform_attn_fused has no second derivative"):
        gradient.square().sum().backward()


MISTAKES = {
    "reference_points must be [B or 1, Q, L or 1, 2 or 4] with B=2, Q=9, L=3": lambda v, r, o, z: (
        v,
        r[..., :1],
        o,
        z,
    ),
    "got [2, 8, 3, 2]": lambda v, r, o, z: (v, r[:, :8], o, z),
    "sampling_offsets must be [B, Q, M, L, P, 2]": lambda v, r, o, z: (v, r, o[:, :, :, :2], z),
    "attention_logits must be [2, 9, 3, 9], like sampling_offsets": lambda v, r, o, z: (v, r, o, z[..., :8]),
    "ms_deform_attn_fused: value must be [B, S, M, D]": lambda v, r, o, z: (v[0], r, o, z),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    tensors, tables = make_small()
    with pytest.raises(ValueError) as error:
        call(tables, None)(*MISTAKES[message](*tensors))
    assert message in str(error.value)


def test_locations_and_weights_never_exist_in_memory():
    """Forward allocates the output alone, and what is saved for backward are the inputs themselves."""
    tensors, tables = make_small()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        call(tables, "cpu")(*leaves)
    assert set(saved) <= {tensor.data_ptr() for tensor in (*leaves, *tables)}
