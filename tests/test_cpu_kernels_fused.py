# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels' own parts in the fused form: softmax, reference points and boxes, and the ways to split the work.

The contract of all backends is in tests/test_contract.py.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import KernelCall, launch_backward, launch_forward
from tests.test_cpu_kernels import BF16, DTYPES, FP32, FP64, LEVELS, SPLITS, isa, make
from vitkern import reference
from vitkern.ops import native

__all__ = ["isa"]  # a fixture


def make_fused(numbers=2, image=True, level=True, dtype=FP32, coord_dtype=None, scale=2.0, **sizes):
    """A call in the fused form whose offsets and reference points add up to the locations of make()."""
    value, shapes, start, locations, logits, points = make(**sizes, dtype=FP64)
    batch, queries, _, _, _ = locations.shape
    counts = torch.tensor(points, dtype=torch.int64)
    anchor = torch.rand(batch if image else 1, queries, len(points) if level else 1, 2, dtype=FP64)
    anchor = torch.cat([anchor, 0.3 + torch.rand_like(anchor)], -1)[..., :numbers]
    of_point = anchor.expand(-1, -1, len(points), -1).repeat_interleave(counts, 2)[:, :, None]
    step = 1 / shapes.flip(1).clamp(min=1).repeat_interleave(counts, 0).double()
    if numbers == 4:
        step = of_point[..., 2:] / (2 * counts.repeat_interleave(counts)[:, None])
    offsets = (locations - of_point[..., :2]) / step
    logits = scale * torch.randn_like(logits)
    coord_dtype = coord_dtype or dtype
    return KernelCall(
        value.to(dtype),
        shapes,
        start,
        offsets.to(coord_dtype),
        logits.to(coord_dtype),
        points,
        reference_points=anchor.to(native.accumulator(dtype)),
    )


def fused_oracle(call, grad_output):
    """Output and the gradients of value, offsets, logits and locations in fp64."""
    value, offsets, logits, anchor = (
        t.double().detach().requires_grad_()
        for t in (call.value, call.locations, call.weights, call.reference_points)
    )
    # One reference point for each head and point, whose gradient is that of the location.
    shapes, counts = call.spatial_shapes, torch.tensor(call.points_per_level, dtype=torch.int64)
    of_point = anchor.expand(-1, -1, len(counts), -1).repeat_interleave(counts, 2)[:, :, None]
    places = of_point[..., :2].expand_as(offsets).detach().requires_grad_()
    step = 1 / shapes.flip(1).repeat_interleave(counts, 0).double()
    if anchor.shape[-1] == 4:
        step = of_point[..., 2:] / (2 * counts.repeat_interleave(counts)[:, None])
    # A box that is not finite leads nowhere, and its offsets get no gradient.
    moved = torch.where(step.isfinite(), offsets * torch.where(step.isfinite(), step, 0), float("nan"))
    output = reference.ms_deform_attn(
        value,
        shapes,
        call.level_start_index,
        places + moved,
        logits.softmax(-1),
        call.points_per_level,
        call.method,
    )
    fused = reference.ms_deform_attn_fused(
        value, *call[1:3], anchor, offsets, logits, call.points_per_level, call.method
    )
    torch.testing.assert_close(output, fused, equal_nan=True)
    gradients = torch.autograd.grad(
        output,
        (value, offsets, logits, places),
        grad_output.double(),
        allow_unused=True,
        materialize_grads=True,
    )
    return output.detach(), *gradients


def fused_kernel(call, grad_output, needed=(True,) * 4):
    output = launch_forward("cpu", *call)
    return output, *launch_backward("cpu", grad_output, needed, *call)


def random_grad_output(call):
    batch, _, heads, channels = call.value.shape
    return torch.randn(batch, call.weights.shape[1], heads * channels).to(call.value.dtype)


def assert_fused_matches_oracle(call):
    grad_output = random_grad_output(call)
    expected = fused_oracle(call, grad_output)
    names = ("output", "value", "offsets", "logits", "places")
    for name, got, want in zip(names, fused_kernel(call, grad_output), expected):
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN elsewhere than in the oracle"
        if got.numel() == 0:
            continue
        relative = torch.finfo(got.dtype).eps + 64 * torch.finfo(native.accumulator(call.value.dtype)).eps
        tolerance = relative * max(1.0, want.nan_to_num(0.0).abs().max().item())
        difference = (got.double() - want).abs().nan_to_num(0.0).max().item()
        assert difference <= tolerance, f"{name}: off by {difference:.3g}, allowed {tolerance:.3g}"


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("image", [True, False], ids=["images", "all-images"])
@pytest.mark.parametrize("level", [True, False], ids=["levels", "all-levels"])
def test_fused(isa, numbers, image, level, method):
    assert_fused_matches_oracle(make_fused(numbers, image, level)._replace(method=method))


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_fused_dtypes(isa, dtypes, numbers):
    assert_fused_matches_oracle(make_fused(numbers, dtype=dtypes[0], coord_dtype=dtypes[1]))


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize(
    "points",
    [(1,), (3,), (16,), (17,), (33,), (300,), (3, 6, 3, 1), (0, 1, 0, 7), (0, 0, 0, 0), (300, 1, 40, 7)],
)
def test_fused_numbers_of_points(isa, points, numbers, method):
    call = make_fused(numbers, level=len(points) > 1, levels=LEVELS[: len(points)], points=points, Q=5)
    assert_fused_matches_oracle(call._replace(method=method))


@pytest.mark.parametrize(
    "sizes",
    [
        *({"B": 0}, {"Q": 0}, {"M": 0}, {"D": 0}),
        {"levels": ((0, 5), (3, 0)), "points": (2, 2)},
        {"levels": ((4, 5), (0, 3), (2, 0), (2, 2))},
    ],
    ids=str,
)
def test_fused_empty(isa, sizes):
    assert_fused_matches_oracle(make_fused(4, **sizes))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_softmax_of_extreme_logits(isa, dtype):
    """The softmax equals torch's for huge, distant and infinite logits, and is NaN where torch's is."""
    call = make_fused(dtype=dtype, scale=40.0, Q=64)
    logits = call.weights
    logits[:, 0] += 1e4
    logits[:, 1] -= 1e4
    logits[:, 2, :, ::3] = 1e4
    logits[:, 3, :, 1:] = -float("inf")
    logits[:, 4, :, 5] = -float("inf")
    assert_fused_matches_oracle(call)
    logits[:, 5] = -float("inf")
    logits[:, 6, :, 2] = float("inf")
    logits[:, 7, :, 3] = float("nan")
    logits[:, 8] = float("nan")
    expected = fused_oracle(call, random_grad_output(call))
    got = fused_kernel(call, random_grad_output(call))
    assert torch.equal(got[0].isnan(), expected[0].isnan())
    assert torch.equal(got[3].isnan(), expected[3].isnan())


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_offsets_that_lead_nowhere_take_part_in_the_softmax(isa, method):
    call = make_fused(Q=64)._replace(method=method)
    where = call.locations.view(-1)[::5]
    extremes = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31)])
    where.copy_(extremes.repeat(where.numel())[: where.numel()])
    assert_fused_matches_oracle(call)


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
def test_fused_sizes_of_boxes_that_are_no_sizes(isa, size, method):
    call = make_fused(4, Q=64)._replace(method=method)
    call.reference_points.view(-1)[2::7] = size  # among x, y, widths and heights
    assert_fused_matches_oracle(call)


@pytest.mark.parametrize("start", [[-1, 0, 0, 0], [0, 0, 0, 10_000]], ids=str)
def test_fused_levels_outside_of_value_are_refused(isa, start):
    call = make_fused()._replace(level_start_index=torch.tensor(start))
    with pytest.raises(ValueError, match="reaches outside of value"):
        launch_forward("cpu", *call)
    with pytest.raises(ValueError, match="reaches outside of value"):
        launch_backward("cpu", random_grad_output(call), (True,) * 4, *call)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_fused_bits_do_not_depend_on_threads(isa, split, dtype):
    call = make_fused(**SPLITS[split], dtype=dtype)
    grad_output = random_grad_output(call)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(fused_kernel(call, grad_output))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("wanted", range(4), ids=["value", "offsets", "logits", "places"])
def test_fused_only_wanted_gradients(isa, wanted, dtype):
    call = make_fused(4, dtype=dtype)
    grad_output = random_grad_output(call)
    all_gradients = fused_kernel(call, grad_output)[1:]
    needed = tuple(i == wanted for i in range(4))
    for i, gradient in enumerate(fused_kernel(call, grad_output, needed)[1:]):
        assert torch.equal(gradient, all_gradients[i]) if i == wanted else gradient is None
