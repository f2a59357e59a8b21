# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of ms_deform_attn, emulated: every dispatch branch, thread order and odd input, and the sanitizers.

What all backends promise is in tests/test_ms_deform_attn.py; here is what only these kernels could get wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests import emulated
from tests.helpers import guarded_memory, max_error
from vitkern import reference
from vitkern.ops import native

pytestmark = pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON))

LEVELS = ((5, 7), (3, 4), (1, 2))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(native, "cuda_module", emulated.module())


def make(
    channels,
    dtype=torch.float32,
    *,
    points=(3, 3, 3),
    queries=9,
    heads=3,
    batch=2,
    coordinates=None,
    spread=1.5,
):
    """The arguments of native.*_cuda but the method: locations in and around the map."""
    shapes = torch.tensor(LEVELS)
    pixels = shapes.prod(1)
    value = torch.randn(batch, int(pixels.sum()), heads, channels, dtype=torch.float64)
    where = (torch.rand(batch, queries, heads, sum(points), 2, dtype=torch.float64) - 0.5) * spread + 0.5
    weights = torch.randn(batch, queries, heads, sum(points), dtype=torch.float64)
    wide = coordinates or dtype
    return [value.to(dtype), shapes, pixels.cumsum(0) - pixels, where.to(wide), weights.to(wide), points]


def plain(args, method, grad_output, dtype):
    """Output and gradients of the reference, computed in `dtype`."""
    value, shapes, starts, where, weights, points = args
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (value, where, weights)]
    output = reference.ms_deform_attn(leaves[0], shapes, starts, *leaves[1:], points, method)
    gradients = torch.autograd.grad(
        output, leaves, grad_output.to(dtype), allow_unused=True, materialize_grads=True
    )
    return [output.detach(), *gradients]


def ours(args, method, grad_output, *, needed=ALL, deterministic=False):
    output = native.ms_deform_attn_forward_cuda(*args, method)
    return [
        output,
        *native.ms_deform_attn_backward_cuda(grad_output, needed, *args, method, deterministic=deterministic),
    ]


def assert_right(args, method="bilinear", *, deterministic=False):
    """Error at most twice that of plain torch in the dtype; sums of some 50 terms in another order may differ."""
    value = args[0]
    shape = (value.shape[0], args[3].shape[1], value.shape[2] * value.shape[3])
    grad_output = torch.randn(shape, dtype=torch.float64).to(value.dtype)
    oracle = plain(args, method, grad_output, torch.float64)
    same = plain(args, method, grad_output, value.dtype)
    with guarded_memory():
        actual = ours(args, method, grad_output, deterministic=deterministic)
    for name, a, s, o in zip(("output", "value", "locations", "weights"), actual, same, oracle):
        assert_close_to_oracle(a, s, o, name)


def assert_close_to_oracle(actual, same, oracle, name):
    finite = oracle[oracle.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    units = (
        32 if actual.dtype == torch.float64 else 8
    )  # in float64 the oracle is no more exact than the result
    allowed = 2 * max_error(same, oracle) + units * torch.finfo(actual.dtype).eps * largest
    error = max_error(actual, oracle)
    assert torch.equal(actual.isnan(), oracle.isnan()), f"{name}: NaN in other places"
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 16, 30, 32, 64, 71, 130])
def test_every_dispatch_branch_is_right(channels, dtype):
    assert_right(make(channels, dtype))
    assert_right(make(channels, dtype), deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [5, 32])
def test_nearest_and_levels_of_unequal_points(channels, dtype, deterministic):
    assert_right(make(channels, dtype, points=(5, 0, 2)), deterministic=deterministic)
    # Coordinates whose 16 bits are rounded alike everywhere: the nearest pixel must not hang on a last bit.
    args = make(channels, dtype, points=(1, 9, 3), spread=1.0)
    args[3] = (args[3] * 16).floor() / 16 + 1 / 64
    assert_right(args, "nearest", deterministic=deterministic)


@pytest.mark.parametrize("points", [1, 7, 33])
def test_any_number_of_points(points):
    assert_right(make(32, points=(points,) * 3))
    assert_right(make(3, points=(points,) * 3), deterministic=True)


@pytest.mark.parametrize("channels", [30, 32])
@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_each_gradient_alone_equals_all_together(channels, needed):
    args, grad_output = make(channels), torch.randn(2, 9, 3 * channels)
    everything = ours(args, "bilinear", grad_output)[1:]
    some = ours(args, "bilinear", grad_output, needed=tuple(map(bool, needed)))[1:]
    for gradient, reference_gradient, want in zip(some, everything, needed):
        assert (gradient is not None) == bool(want)
        if want:
            torch.testing.assert_close(gradient, reference_gradient)


@pytest.mark.parametrize("channels", [16, 32, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_no_bit_but_of_the_atomics(channels, dtype, monkeypatch):
    args, grad_output = make(channels, dtype, queries=40), torch.randn(2, 40, 3 * channels).to(dtype)
    results = []
    for order in "01":
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        results.append(ours(args, "bilinear", grad_output, deterministic=True))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("channels", [3, 32])
def test_nothing_outside_is_read_and_nan_spreads_as_in_torch(channels, deterministic):
    args = make(channels, points=(4, 0, 0), queries=30)
    args[0][:, 35:] = float("nan")  # the other levels, next to the last pixel of the first
    args[3][..., 0, :] = torch.tensor([1.05, 1.05])  # off its lower right corner
    args[3][..., 1, 0] = (
        torch.rand_like(args[3][..., 1, 0]).sub(0.5).sign() * 0.56 + 0.5
    )  # off the left or right
    assert_right(args, deterministic=deterministic)
    args[0][0, 3, 1, 0] = float("nan")
    assert_right(args, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_gradients_that_are_not_finite(deterministic):
    args, grad_output = make(32), torch.randn(2, 9, 96)
    grad_output[0, 3, 5], grad_output[1, 2, 40] = float("nan"), float("inf")
    oracle = plain(args, "bilinear", grad_output.double(), torch.float64)
    for actual, expected in zip(ours(args, "bilinear", grad_output, deterministic=deterministic), oracle):
        assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    "x", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-45, -1 / 7, 0.0, 1.0]
)
def test_extreme_locations(method, x):
    args = make(32)
    args[3][..., ::2, 0] = x
    assert_right(args, method)
    assert_right(args, method, deterministic=True)


@pytest.mark.parametrize("size", ["batch", "queries", "heads", "channels"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_empty_sizes_launch_nothing(size, deterministic):
    args = make(**{"channels": 4, size: 0})
    grad_output = torch.zeros(args[0].shape[0], args[3].shape[1], args[0].shape[2] * args[0].shape[3])
    for result in ours(args, "bilinear", grad_output, deterministic=deterministic):
        assert (result == 0).all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("points", [(0, 0, 0), (2, 2, 2)])
def test_no_points_or_no_pixels_give_zeros(points, deterministic):
    args = make(32, points=points)
    if sum(points):
        args[0], args[1] = args[0][:, :0], torch.zeros_like(args[1])
    for result in ours(args, "bilinear", torch.ones(2, 9, 96), deterministic=deterministic):
        assert (result == 0).all()


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    ("height", "width", "start"), [(8, 7, 0), (5, 7, 40), (5, 7, -1), (-5, -7, 0), (2**33, 1, 0)]
)
def test_a_level_that_reaches_out_of_value_gives_nan(method, height, width, start):
    args = make(32)
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][0], args[2][0] = torch.tensor([height, width]), start
    output = ours(args, method, torch.ones(2, 9, 96))[0]
    assert output.isnan().all()
    ours(args, method, torch.ones(2, 9, 96), deterministic=True)


def test_levels_that_overlap():
    args = make(16)
    args[2] = torch.tensor([0, 2, 1])
    assert_right(args)
    assert_right(args, deterministic=True)


def test_empty_levels_touch_nothing():
    args = make(16)
    args[1] = torch.tensor([[5, 7], [0, 4], [3, 0]])
    args[2] = torch.tensor([0, 35, 35])
    assert_right(args)
    assert_right(args, deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_addresses_that_are_not_whole_vectors(deterministic):
    args = make(32)
    storage = torch.cat([torch.zeros(1), args[0].flatten()])
    args[0] = storage[1:].view_as(args[0])
    assert args[0].data_ptr() % 16
    assert args[0].is_contiguous()
    assert_right(args, deterministic=deterministic)


def test_sizes_beyond_the_kernels_are_refused():
    args = make(4, points=(1,) * 3)
    args[1], args[2] = torch.zeros(1025, 2, dtype=torch.int64), torch.zeros(1025, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="ms_deform_attn on CUDA: more than 1024 levels"):
        native.ms_deform_attn_forward_cuda(*args[:5], (1,) * 3, "bilinear")


# ---- The fused form


def make_fused(channels, dtype=torch.float32, *, numbers=2, broadcast=(), sharp=1.0, **sizes):
    """What make() gives, with offsets and logits for locations and weights, and reference points."""
    args = make(channels, dtype, **sizes)
    batch, queries, levels = args[0].shape[0], args[3].shape[1], len(args[5])
    wide = native.accumulator(dtype)
    shape = (
        1 if "images" in broadcast else batch,
        queries,
        1 if "levels" in broadcast else levels,
        numbers,
    )
    reference_points = torch.rand(shape, dtype=torch.float64)
    offsets = torch.randn(args[3].shape, dtype=torch.float64) * (1.5 if numbers == 2 else max(args[5]))
    args[3], args[4] = offsets.to(args[3].dtype), args[4] * sharp
    return args, reference_points.to(wide)


def plain_fused(args, reference_points, method, grad_output, dtype):
    """Output and gradients of value, offsets, logits and the locations that come about, computed in `dtype`."""
    value, shapes, starts, offsets, logits, points = args
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (value, offsets, logits)]
    locations = []
    original = reference.ms_deform_attn

    def spy(*arguments):
        locations.append(arguments[3])
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ms_deform_attn", spy)
        output = reference.ms_deform_attn_fused(
            leaves[0], shapes, starts, reference_points.to(dtype), *leaves[1:], points, method
        )
    gradients = torch.autograd.grad(
        output,
        [*leaves, locations[0]],
        grad_output.to(dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    return [output.detach(), *gradients]


def assert_fused_right(args, reference_points, method="bilinear", *, deterministic=False):
    value, logits = args[0], args[4]
    shape = (value.shape[0], logits.shape[1], value.shape[2] * value.shape[3])
    grad_output = torch.randn(shape, dtype=torch.float64).to(value.dtype)
    oracle = plain_fused(args, reference_points, method, grad_output, torch.float64)
    same = plain_fused(args, reference_points, method, grad_output, value.dtype)
    call = (*args, method, reference_points)
    with guarded_memory():
        output = native.ms_deform_attn_forward_cuda(*call)
        gradients = native.ms_deform_attn_backward_cuda(
            grad_output, (True,) * 4, *call, deterministic=deterministic
        )
    names = ("output", "value", "offsets", "logits", "places")
    dtypes = (value.dtype, value.dtype, args[3].dtype, logits.dtype, native.accumulator(value.dtype))
    for name, dtype, a, s, o in zip(names, dtypes, [output, *gradients], same, oracle):
        assert a.dtype == dtype, f"{name}: {a.dtype}"
        assert_close_to_oracle(a, s, o, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 30, 32, 64])
@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_every_dispatch_branch_is_right(channels, dtype, numbers):
    assert_fused_right(*make_fused(channels, dtype, numbers=numbers))
    assert_fused_right(*make_fused(channels, dtype, numbers=numbers), deterministic=True)


@pytest.mark.parametrize("broadcast", [(), ("images",), ("levels",), ("images", "levels")])
@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_reference_points_that_are_shared(numbers, broadcast):
    for deterministic in (False, True):
        args = make_fused(32, numbers=numbers, broadcast=broadcast)
        assert_fused_right(*args, deterministic=deterministic)


@pytest.mark.parametrize("points", [(1, 0, 0), (1, 1, 1), (8, 3, 5), (0, 17, 0), (20, 13, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_levels_of_unequal_points(points, dtype, numbers):
    for channels, method in ((16, "bilinear"), (5, "bilinear"), (32, "nearest"), (30, "nearest")):
        args = make_fused(channels, dtype, points=points, numbers=numbers)
        assert_fused_right(*args, method, deterministic=channels % 3 == 2)


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -float("inf"), 3e38, 1e30])
def test_fused_extreme_offsets_take_part_in_the_softmax(method, offset):
    args, reference_points = make_fused(32)
    args[3][..., ::2, 0] = offset
    assert_fused_right(args, reference_points, method)
    assert_fused_right(args, reference_points, method, deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("logit", [-float("inf"), float("inf"), float("nan"), 1e4, -1e4, 3e38])
def test_fused_extreme_logits(logit, deterministic):
    args, reference_points = make_fused(32)
    args[4][:, ::2, :, 4] = logit
    assert_fused_right(args, reference_points, deterministic=deterministic)
    args[4][0, 1] = logit  # all points of a query
    assert_fused_right(args, reference_points, deterministic=deterministic)


@pytest.mark.parametrize("channels", [30, 32])
@pytest.mark.parametrize("needed", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0)])
def test_fused_each_gradient_alone_equals_all_together(channels, needed):
    args, reference_points = make_fused(channels, numbers=4)
    call, grad_output = (*args, "bilinear", reference_points), torch.randn(2, 9, 3 * channels)
    everything = native.ms_deform_attn_backward_cuda(grad_output, (True,) * 4, *call)
    some = native.ms_deform_attn_backward_cuda(grad_output, tuple(map(bool, needed)), *call)
    for gradient, whole, want in zip(some, everything, needed):
        assert (gradient is not None) == bool(want)
        if want:
            torch.testing.assert_close(gradient, whole)


@pytest.mark.parametrize("channels", [16, 30, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fused_the_order_of_threads_changes_no_bit(channels, dtype, monkeypatch):
    args, reference_points = make_fused(channels, dtype, queries=40, numbers=4)
    call, grad_output = (*args, "bilinear", reference_points), torch.randn(2, 40, 3 * channels).to(dtype)
    results = []
    for order in "01":
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        gradients = native.ms_deform_attn_backward_cuda(grad_output, (True,) * 4, *call, deterministic=True)
        results.append([native.ms_deform_attn_forward_cuda(*call), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_fused_without_pixels_gives_zeros():
    args, reference_points = make_fused(32)
    args[0], args[1] = args[0][:, :0], torch.zeros_like(args[1])
    call = (*args, "bilinear", reference_points)
    gradients = native.ms_deform_attn_backward_cuda(torch.ones(2, 9, 96), (True,) * 4, *call)
    for result in (native.ms_deform_attn_forward_cuda(*call), *gradients):
        assert (result == 0).all()


@pytest.mark.slow
@pytest.mark.skipif("VITKERN_EMULATED" in os.environ, reason="this is the sanitized run")
def test_the_sanitizers_find_nothing():
    chosen = "(branch and float32 and not 130) or unequal or outside or out_of_value or overlap or whole or no_pixels"
    chosen += " or (fused and (shared or extreme_offsets or without or (branch and float32)))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(
        command,
        env={**os.environ, **emulated.sanitizer_environment()},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
