# SPDX-License-Identifier: Apache-2.0
"""Faults that only the CUDA kernels of ms_deform_attn could have, emulated: their dispatch, teams and addresses.

test_contract.py tests the contract of all backends on these kernels too, with and without atomics.
"""

from __future__ import annotations

import pytest
import torch

from tests import emulated
from tests.helpers import assert_as_exact_as, gradients, guarded_memory, launch_backward, launch_forward
from vitkern import reference
from vitkern.ops import native

pytestmark = pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON))

LEVELS = ((5, 7), (3, 4), (1, 2))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
UNITS = dict.fromkeys(DTYPES, 16) | {torch.float64: 32}  # sums of up to 400 terms, each in another order
ORDERS = pytest.mark.parametrize("deterministic", [False, True], ids=["free", "ordered"])


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(native, "cuda_module", emulated.module())


def make(channels, dtype=torch.float32, *, points=(3, 3, 3), queries=9, numbers=0):
    """Arguments of the native launchers: locations, or offsets from reference points, in and around the map."""
    shapes = torch.tensor(LEVELS)
    pixels = shapes.prod(1)
    value = torch.randn(2, int(pixels.sum()), 3, channels, dtype=torch.float64)
    where = torch.rand(2, queries, 3, sum(points), 2, dtype=torch.float64) * 1.5 - 0.25
    weights = torch.randn(2, queries, 3, sum(points), dtype=torch.float64)
    args = [value.to(dtype), shapes, pixels.cumsum(0) - pixels, where.to(dtype), weights.to(dtype), points]
    args += ["bilinear", None]
    if numbers:
        args[3] = (torch.randn(where.shape, dtype=torch.float64) * (1.5 if numbers == 2 else 3)).to(dtype)
        args[7] = torch.rand(2, queries, 3, numbers, dtype=torch.float64).to(native.accumulator(dtype))
    return args


def ours(args, grad_output, *, needed=(True,) * 3, deterministic=False):
    output = launch_forward("cuda", *args)
    return [
        output,
        *launch_backward("cuda", grad_output, needed, *args, deterministic=deterministic),
    ]


def plain(args, grad_output, dtype):
    """Output and gradients of value, locations or offsets, and weights or logits by plain torch in `dtype`."""
    value, shapes, starts, where, weights, points, method, anchors = args

    def function(value, where, weights):
        if anchors is None:
            return reference.ms_deform_attn(value, shapes, starts, where, weights, points, method)
        boxes = anchors.to(dtype)
        return reference.ms_deform_attn_fused(value, shapes, starts, boxes, where, weights, points, method)

    return gradients(function, [tensor.to(dtype) for tensor in (value, where, weights)], grad_output)


def assert_right(args, *, deterministic=False, grad_output=None):
    """Checks output and every gradient, with the error that another order of sums may have."""
    value, fused = args[0], args[7] is not None
    if grad_output is None:
        shape = (value.shape[0], args[3].shape[1], value.shape[2] * value.shape[3])
        grad_output = torch.randn(shape, dtype=torch.float64).to(value.dtype)
    with guarded_memory():
        actual = ours(args, grad_output, needed=(True,) * (4 if fused else 3), deterministic=deterministic)
    same, oracle = plain(args, grad_output, value.dtype), plain(args, grad_output, torch.float64)
    for name, a, s, o in zip(("output", "value", "locations", "weights"), actual, same, oracle):
        assert_as_exact_as(a, s, o, what=name, units=UNITS)


@ORDERS
@pytest.mark.parametrize("numbers", [0, 2, 4], ids=["plain", "points", "boxes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 32, 64, 130])
def test_every_dispatch_branch_is_right(channels, dtype, numbers, deterministic):
    assert_right(make(channels, dtype, numbers=numbers), deterministic=deterministic)


@ORDERS
@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("points", [(1, 0, 0), (7, 7, 7), (33, 33, 33), (0, 17, 0), (20, 13, 7)])
def test_any_number_of_points(points, channels, deterministic):
    for numbers in (0, 4):
        assert_right(make(channels, points=points, numbers=numbers), deterministic=deterministic)


@pytest.mark.parametrize("channels", [30, 32])
@pytest.mark.parametrize("numbers", [0, 4], ids=["plain", "fused"])
def test_each_gradient_alone_equals_all_together(channels, numbers):
    """The sanitized run also checks that no address is computed from the null pointer of an unneeded gradient."""
    args, grad_output = make(channels, numbers=numbers), torch.randn(2, 9, 3 * channels)
    count = 4 if numbers else 3
    all_gradients = ours(args, grad_output, needed=(True,) * count)[1:]
    for wanted in range(count):
        needed = tuple(i == wanted for i in range(count))
        some = ours(args, grad_output, needed=needed)[1:]
        assert [gradient is not None for gradient in some] == list(needed)
        torch.testing.assert_close(some[wanted], all_gradients[wanted])


@pytest.mark.parametrize("numbers", [0, 4], ids=["plain", "fused"])
@pytest.mark.parametrize("channels", [16, 32, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_no_bit_but_of_the_atomics(channels, dtype, numbers, monkeypatch):
    args, grad_output = (
        make(channels, dtype, queries=40, numbers=numbers),
        torch.randn(2, 40, 3 * channels).to(dtype),
    )
    results = []
    for order in "01":
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        results.append(ours(args, grad_output, deterministic=True))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@ORDERS
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


@ORDERS
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("numbers", [0, 2], ids=["plain", "fused"])
@pytest.mark.parametrize("x", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-45])
def test_extreme_locations(x, numbers, method, deterministic):
    args = make(32, numbers=numbers)
    args[3][..., ::2, 0], args[6] = x, method
    assert_right(args, deterministic=deterministic)


@ORDERS
@pytest.mark.parametrize("logit", [-float("inf"), float("inf"), float("nan"), 1e4, 3e38])
def test_extreme_logits(logit, deterministic):
    args = make(32, numbers=2)
    args[4][:, ::2, :, 4] = logit
    args[4][0, 1] = logit  # all points of a query
    assert_right(args, deterministic=deterministic)


@ORDERS
@pytest.mark.parametrize("channels", [3, 32])
def test_an_infinite_weight_makes_the_nearest_gradient_infinite(channels, deterministic):
    args = make(channels)
    args[4][0, 2, 1, 3], args[6] = float("inf"), "nearest"
    assert_right(args, deterministic=deterministic, grad_output=torch.rand(2, 9, 3 * channels) + 1)


@ORDERS
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(8, 7, 0), (5, 7, 40), (5, 7, -1), (-5, -7, 0), (2**33, 1, 0)])
def test_a_level_that_reaches_out_of_value_gives_nan(size, method, deterministic):
    args = make(32)
    args[1], args[2], args[6] = args[1].clone(), args[2].clone(), method
    args[1][0], args[2][0] = torch.tensor(size[:2]), size[2]
    assert ours(args, torch.ones(2, 9, 96), deterministic=deterministic)[0].isnan().all()


@ORDERS
@pytest.mark.parametrize(
    ("shapes", "starts"),
    [(LEVELS, (0, 2, 1)), (((5, 7), (0, 4), (3, 0)), (0, 35, 35))],
    ids=["overlap", "empty"],
)
def test_levels_may_overlap_or_be_empty(shapes, starts, deterministic):
    args = make(16)
    args[1], args[2] = torch.tensor(shapes), torch.tensor(starts)
    assert_right(args, deterministic=deterministic)


@ORDERS
def test_addresses_that_are_not_whole_vectors(deterministic):
    args = make(32)
    args[0] = torch.cat([torch.zeros(1), args[0].flatten()])[1:].view_as(args[0])
    assert args[0].data_ptr() % 16
    assert_right(args, deterministic=deterministic)


@pytest.mark.parametrize("levels, dtype", [(1025, torch.float32), (513, torch.float64)])
def test_levels_beyond_shared_memory_are_refused(levels, dtype):
    args = make(4, points=(1,) * levels, queries=1, dtype=dtype)
    args[1], args[2] = torch.zeros(levels, 2, dtype=torch.int64), torch.zeros(levels, dtype=torch.int64)
    message = "ms_deform_attn on CUDA: more than 1024 levels, of float64 more than 512"
    with pytest.raises(RuntimeError, match=message):
        launch_forward("cuda", *args)


def test_filing_takes_images_of_more_than_32_bits_of_elements(tmp_path):
    *tensors, points = make(4)[:6]
    cells = native.host("cuda", tensors[0].device).ms_deform_attn_cells(
        [((tensors[4].numel(),), torch.int64)], fused=False, points_per_level=points, method="bilinear"
    )
    small = cells(*tensors)
    shape = (*tensors[0].shape[:3], 2**28)
    numbers = torch.Size(shape).numel()  # a file with holes: its pixels are not looked at
    tensors[0] = torch.from_file(str(tmp_path / "value"), shared=True, size=numbers).view(shape)
    assert tensors[0][0].numel() > 2**32
    assert torch.equal(small, cells(*tensors))
