# SPDX-License-Identifier: Apache-2.0
"""Branches of the Triton kernels and their launcher that the contract in test_contract.py does not reach.

The interpreter's time grows with operations and programs, so shapes have few heads and points.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.helpers import gradients, launch_backward, launch_forward
from vitkern import reference
from vitkern.ops import triton_ms_deform_attn

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU runs the compiled kernels", allow_module_level=True)


def make(points_per_level, channels, *, sizes=((3, 5), (4, 2), (1, 2)), batch=1, heads=2, queries=3):
    """Arguments in float64, with locations in and around the map and a quarter pixel off the cell edges."""
    shapes = torch.tensor(sizes[: len(points_per_level)])
    pixels = shapes.prod(1)
    points = torch.tensor(points_per_level)
    width_height = shapes.flip(1).repeat_interleave(points, 0).double()
    cell = (torch.rand(batch, queries, heads, len(width_height), 2) * (width_height + 2) - 1.5).floor()
    locations = (cell + 0.25 + 0.5 * torch.rand_like(cell) + 0.5) / width_height
    value = torch.randn(batch, int(pixels.sum()), heads, channels, dtype=torch.float64)
    weights = torch.rand(batch, queries, heads, len(width_height), dtype=torch.float64)
    return value, shapes, pixels.cumsum(0) - pixels, locations.double(), weights, points_per_level


class Interpreted(torch.autograd.Function):
    """The two launchers under autograd, for checks in float64, which the public op does not allow on Triton."""

    @staticmethod
    def forward(ctx, value, locations, weights, shapes, level_start, points_per_level, method, deterministic):
        ctx.save_for_backward(value, shapes, level_start, locations, weights)
        ctx.options = points_per_level, method, deterministic
        return launch_forward(
            "triton", value, shapes, level_start, locations, weights, points_per_level, method
        )

    @staticmethod
    def backward(ctx, grad_output):
        points_per_level, method, deterministic = ctx.options
        needed = tuple(ctx.needs_input_grad[:3])
        grads = launch_backward(
            "triton",
            grad_output.contiguous(),
            needed,
            *ctx.saved_tensors,
            points_per_level,
            method,
            deterministic=deterministic,
        )
        return *grads, None, None, None, None, None


def compare(arguments, method="bilinear", deterministic=False, dtype=torch.float64, tolerance=1e-12):
    value, shapes, level_start, locations, weights, points_per_level = arguments
    tensors = tuple(t.to(dtype) for t in (value, locations, weights))
    rest = shapes, level_start

    def ours(v, x, w):
        return Interpreted.apply(v, x, w, *rest, points_per_level, method, deterministic)

    def oracle(v, x, w):
        return reference.ms_deform_attn(v, *rest, x, w, points_per_level, method)

    grad_output = torch.randn_like(oracle(*tensors))
    exact = gradients(oracle, tuple(t.double() for t in tensors), grad_output.double())
    for actual, expected in zip(gradients(ours, tensors, grad_output), exact):
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("channels", [1, 130, 300])  # two and more blocks of channels beyond 256
def test_any_number_of_channels(channels, deterministic):
    compare(make((2, 2), channels), deterministic=deterministic)


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("points_per_level", [(3, 3), (2, 4, 2), (1, 0, 2)])
def test_runs_of_points(points_per_level, deterministic, method):
    compare(make(points_per_level, 3, batch=2, heads=1), method, deterministic)


def test_runs_are_the_greatest_common_divisor():
    groups = triton_ms_deform_attn._groups
    cpu = torch.device("cpu")
    assert groups((4, 4, 4), cpu) == (3, 4, None)
    assert groups((2, 4, 0), cpu)[:2] == (3, 2)
    assert groups((2, 4, 0), cpu)[2].tolist() == [0, 1, 1, 2, 4, 0]


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(triton_ms_deform_attn, "_INT32_OFFSETS", 0)
    compare(make((2, 1), 16))


def test_levels_that_overlap_add_up_in_the_deterministic_pass():
    value, shapes, _, *rest = make((2, 2), 4, sizes=((3, 4), (2, 4)))
    compare((value[:, :12].contiguous(), shapes, torch.tensor([0, 4]), *rest), deterministic=True)


def test_pixels_of_no_level_get_a_zero_gradient():
    value, shapes, level_start, locations, weights, points = make((2, 2), 4)
    gap = torch.cat([value, value[:, :3]], 1)
    compare((gap, shapes, level_start + 1, locations, weights, points), deterministic=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_spoils_nothing_outside_the_map(bad):
    value, shapes, level_start, locations, weights, points = make((1,), 4, queries=2)
    locations[:] = 5.0
    weights[:] = bad
    output = launch_forward("triton", value, shapes, level_start, locations, weights, points, "bilinear")
    assert (output == 0).all()
    arguments = value, shapes, level_start, locations, weights, points, "bilinear"
    for deterministic in (False, True):
        grads = launch_backward(
            "triton", torch.ones_like(output), (True, True, True), *arguments, deterministic=deterministic
        )
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_gradcheck(deterministic):
    value, shapes, level_start, locations, weights, points = make(
        (1, 1), 2, heads=1, queries=2, sizes=((2, 2), (1, 2))
    )
    inputs = tuple(t.requires_grad_() for t in (value, locations, weights))

    def function(v, x, w):
        return Interpreted.apply(v, x, w, shapes, level_start, points, "bilinear", deterministic)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def make_fused(points_per_level, channels, numbers=2, images=1, levels=1, **sizes):
    """Arguments of the fused form in float64, from locations that keep off the cell edges."""
    value, shapes, level_start, locations, logits, _ = make(points_per_level, channels, **sizes)
    batch, queries, heads, points, _ = locations.shape
    size = shapes.flip(1).double()
    points_of = torch.tensor(points_per_level)
    anchors = torch.rand(images, queries, levels, numbers, dtype=torch.float64) + 0.1
    anchor = anchors.expand(batch, -1, len(size), -1).repeat_interleave(points_of, 2)[:, :, None]
    unit = 1 / size.repeat_interleave(points_of, 0)
    if numbers == 4:
        unit = anchor[..., 2:] / (2 * points_of.repeat_interleave(points_of)[:, None])
    offsets = (locations - anchor[..., :2]) / unit
    return value, shapes, level_start, offsets, torch.randn_like(logits), tuple(points_per_level), anchors


def compare_fused(arguments, method="bilinear", deterministic=False, dtype=torch.float64, tolerance=1e-11):
    """Output and all gradients against the oracle in float64, given the same, rounded inputs."""
    value, shapes, level_start, offsets, logits, points, anchors = arguments
    value, offsets, logits = (t.to(dtype) for t in (value, offsets, logits))
    anchors = anchors.to(torch.promote_types(dtype, torch.float32))
    call = (value, shapes, level_start, offsets, logits, points, method, anchors)
    output = launch_forward("triton", *call)
    grad_output = torch.randn_like(output)
    actual = launch_backward("triton", grad_output, (True,) * 4, *call, deterministic=deterministic)
    assert [t.dtype for t in actual] == [dtype, dtype, dtype, anchors.dtype]
    # A reference point for each point of each head: its gradient is that of the place.
    own = anchors.double().expand(len(value), -1, len(shapes), -1)
    own = own.repeat_interleave(torch.tensor(points), 2)[:, :, None].expand(*offsets.shape[:4], -1)

    def oracle(value, offsets, logits, own):
        points_of = torch.tensor(points).repeat_interleave(torch.tensor(points))
        size = shapes.flip(1).repeat_interleave(torch.tensor(points), 0)
        unit = own[..., 2:] / (2 * points_of[:, None]) if own.shape[-1] == 4 else 1 / size.double()
        locations = own[..., :2] + offsets * unit
        return reference.ms_deform_attn(
            value, shapes, level_start, locations, logits.softmax(-1), points, method
        )

    exact = gradients(oracle, tuple(t.double() for t in (value, offsets, logits, own)), grad_output.double())
    fused = reference.ms_deform_attn_fused(
        value.double(),
        shapes,
        level_start,
        anchors.double(),
        offsets.double(),
        logits.double(),
        points,
        method,
    )
    torch.testing.assert_close(exact[0], fused)
    exact[-1] = exact[-1][..., :2]
    for ours, expected in zip((output, *actual), exact):
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("points_per_level, images, levels", [((1, 1, 1), 2, 1), ((1, 2, 0), 1, 3)])
def test_fused_reference_points(points_per_level, images, levels, numbers, deterministic):
    arguments = make_fused(points_per_level, 3, numbers, images, levels, batch=2, heads=1)
    compare_fused(arguments, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_nearest(numbers, deterministic):
    compare_fused(make_fused((1, 2), 3, numbers), "nearest", deterministic)


@pytest.mark.parametrize("points_per_level, channels", [((1,), 16), ((3,), 30), ((8, 8), 64), ((1, 1), 300)])
def test_fused_points_and_channels(points_per_level, channels):
    compare_fused(make_fused(points_per_level, channels, queries=2, heads=1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_fused_dtypes(dtype, tolerance):
    value, *rest = make_fused((2, 1), 4, queries=2)
    compare_fused((value.to(dtype).double(), *rest), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_fused_logits_may_be_extreme(deterministic):
    value, shapes, level_start, offsets, logits, points, anchors = make_fused((2, 1), 4, queries=5)
    logits[:, 0] += 1e4
    logits[:, 1] *= 1e4
    logits[:, 2] = -1e300
    logits[:, 3, :, 0] = -float("inf")
    compare_fused((value, shapes, level_start, offsets, logits, points, anchors), deterministic=deterministic)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fused_offset_that_is_no_number_adds_nothing(bad):
    value, shapes, level_start, offsets, logits, points, anchors = make_fused((2, 1), 4, queries=2, heads=1)
    offsets[..., 1, 0] = bad
    anchors[:] = 0.5
    arguments = (value, shapes, level_start, offsets.nan_to_num(1e9, 1e9, -1e9), logits, points, anchors)
    call = (value, shapes, level_start, offsets, logits, points, "bilinear", anchors)
    output = launch_forward("triton", *call)
    far = launch_forward("triton", *arguments[:6], "bilinear", anchors)
    assert torch.equal(output, far)
    compare_fused(arguments)
    grads = launch_backward("triton", torch.ones_like(output), (True,) * 4, *call)
    expected = launch_backward(
        "triton", torch.ones_like(output), (True,) * 4, *arguments[:6], "bilinear", anchors
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected))
    nearest = launch_forward("triton", *call[:6], "nearest", anchors)
    assert nearest.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fused_bad_logit_spoils_its_row_and_no_other(bad):
    value, shapes, level_start, offsets, logits, points, anchors = make_fused((2, 1), 4)
    offsets[:], anchors[:] = 0.25, 0.5
    logits[:, 1, 0, 2] = bad
    call = (value, shapes, level_start, offsets, logits, points, "bilinear", anchors)
    output = launch_forward("triton", *call)
    spoilt = torch.zeros(output.shape, dtype=torch.bool)
    spoilt[:, 1, :4] = True
    assert torch.equal(output.isnan(), spoilt)
    _, _, grad_logits, _ = launch_backward(
        "triton", torch.ones_like(output), (False, False, True, False), *call
    )
    assert grad_logits[:, 1, 0].isnan().all()
    assert grad_logits.isnan().sum() == grad_logits[:, 1, 0].numel()


def test_fused_gradients_that_nobody_wants():
    *call, anchors = make_fused((2, 1), 4, queries=2, heads=1)
    call = (*call, "bilinear", anchors)
    output = launch_forward("triton", *call)
    all_gradients = launch_backward("triton", torch.ones_like(output), (True,) * 4, *call)
    for only in range(4):
        needed = tuple(i == only for i in range(4))
        grads = launch_backward("triton", torch.ones_like(output), needed, *call)
        assert tuple(grad is not None for grad in grads) == needed
        assert torch.equal(grads[only], all_gradients[only])
