# SPDX-License-Identifier: Apache-2.0
"""Splits, tiles and limits of the Triton kernels made of matrix products that test_contract.py does not reach."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import vitkern
from tests.helpers import assert_right
from vitkern import reference
from vitkern.cases import AdapterBottleneckCase, TokenCase
from vitkern.ops import triton_products

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU runs the compiled kernels", allow_module_level=True)

import triton
import triton.language as tl

from vitkern.triton_kernels import adapter_bottleneck
from vitkern.triton_kernels.adapter_bottleneck import _dropout


@pytest.fixture
def small_parts(monkeypatch):
    """Splits rows into as many parts as there are blocks."""
    monkeypatch.setattr(triton_products, "_LEAST_ROWS", 1)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 10**6])
@pytest.mark.parametrize("block, others", [(16, 1), (64, 100), (32, 10**6)])
def test_no_part_is_empty(rows, block, others):
    parts = triton_products.parts_of(rows, block, others)
    blocks = triton.cdiv(triton.cdiv(rows, block), parts)  # of each part, as the kernels split them
    assert parts >= 1
    assert (parts - 1) * blocks * block < rows <= parts * blocks * block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pixels_in_more_parts_than_are_merged_at_a_time(small_parts, dtype):
    case = TokenCase("parts", "", 2, 700, 20, 3)
    assert_right("token_pool", case, dtype, backend="triton", recurrent=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, tokens", [(1100, 2), (600, 20), (300, 33)])
def test_channels_in_several_tiles(small_parts, channels, tokens, dtype):
    assert_right("token_pool", TokenCase("wide", "", 1, 70, channels, tokens), dtype, backend="triton")


@pytest.mark.parametrize("hidden", [5, 8])
def test_rows_in_many_blocks_and_parts(small_parts, monkeypatch, hidden):
    monkeypatch.setattr(adapter_bottleneck, "_FEW_ROWS", 0)
    case = AdapterBottleneckCase("long", "", (300,), 40, hidden)
    options = {"residual": "x", "dropout_p": 0.3, "training": True, "activation": "silu"}
    assert_right("adapter_bottleneck", case, torch.bfloat16, backend="triton", **options)


@triton.jit
def _factors(output_ptr, seed_ptr, first, threshold, rescale, H: tl.constexpr, BLOCK_H: tl.constexpr):
    row = tl.cast(first, tl.int64) + tl.arange(0, 16)
    hidden = tl.arange(0, BLOCK_H)
    factor = _dropout(seed_ptr, row, hidden, threshold, rescale, H)
    target = output_ptr + (tl.arange(0, 16) * H)[:, None] + hidden[None, :]
    tl.store(target, factor, mask=(hidden < H)[None, :] & (row >= 0)[:, None])


@pytest.mark.parametrize("hidden", [13, 64])
@pytest.mark.parametrize("first", [0, 2**29 - 8, 2**37])
@pytest.mark.parametrize("p", [0.2, 1.0])
def test_dropout_counts_in_64_bits(first, hidden, p):
    seed = torch.tensor([-5_000_000_000_000_000_001])
    unit = first * hidden + torch.arange(16 * hidden)
    words = torch.stack(reference.philox(seed, unit >> 2), -1).gather(-1, (unit & 3)[:, None])[:, 0]
    threshold, rescale = reference.dropout_threshold(p), reference.dropout_rescale(p)
    expected = torch.where(words >= threshold, rescale, 0.0).float().view(16, hidden)
    actual = torch.empty(16, hidden)
    block = max(16, triton.next_power_of_2(hidden))
    _factors[(1,)](actual, seed, first, threshold, rescale, H=hidden, BLOCK_H=block)
    torch.testing.assert_close(actual, expected)


LIMITS = [
    (
        lambda *t: vitkern.token_pool(*t, backend="triton"),
        [(1, 4, 8), (257, 8)],
        r"backend 'triton' cannot run here: weight must have at most 256 tokens, got 257",
    ),
    (
        lambda *t: vitkern.token_project(*t, backend="triton"),
        [(1, 4, 8), (1, 4, 2), (1, 513, 2), (1, 513, 8)],
        r"backend 'triton' cannot run here: tokens must be at most 512, got 513",
    ),
    (
        lambda x, down, up: vitkern.adapter_bottleneck(x, down, None, up, None, backend="triton"),
        [(4, 8), (513, 8), (8, 513)],
        r"backend 'triton' cannot run here: down_weight must have at most 512 hidden units, got 513",
    ),
]


@pytest.mark.parametrize("function, sizes, message", LIMITS, ids=["pool", "project", "adapter"])
def test_what_does_not_fit_the_registers_is_refused_by_name(function, sizes, message):
    with pytest.raises(RuntimeError, match=message):
        function(*(torch.randn(*size) for size in sizes))
