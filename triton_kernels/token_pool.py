# SPDX-License-Identifier: Apache-2.0
"""Softmax pooling of pixels into tokens, eqs. (1) to (4) of docs/derivations/token_pool.md.

Shapes: B images, N pixels, C channels, T tokens. All images share one weight (weight_stride 0) or each has its own.

Work split: one program owns one part of the pixels of one image, all tokens and BLOCK_C channels of the result. It
loops over blocks of its pixels with a running triple (m, l, o / l) and writes it; ``token_pool_merge`` merges parts.
The third number is a mean of pixels: a sum might overflow.
Memory: x is read from memory once. If all channels fit one tile, it is on the chip for both products; else logits are
summed over tiles of BLOCK_K channels, and the tile of the result is read again from L2.
Offsets of pixels are int64.
Numerics: logits, exponents and sums are float; the factors of products have the type of x, and a pixel's share of the
sum so far is rounded to it. No exponent of forward is positive. NaN and infinities in x spread as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import part_of, product, read_tile, write_tile

MAX_TOKENS = 256  # more do not fit the registers of one program


def launch_table(channels: int, tokens: int, item_bytes: int, backward: bool = False) -> dict[str, int]:
    """Block sizes that hold a tile of tokens and channels, and in backward of pixels and channels, in registers.

    Chosen by static figures (registers, spills, shared memory), not measured on a card.
    """
    block_t = max(triton.next_power_of_2(tokens), 16)
    few, floats = block_t == 16, item_bytes == 4  # products of floats keep their factors in registers
    if floats:
        widest = 4096 // block_t if backward else 1024 if few else 8192 // block_t
    else:
        widest = (8192 if backward else 16384) // block_t
    block_c = max(16, min(triton.next_power_of_2(channels), widest))
    if floats:
        block_n = 32 if few and block_c <= 256 else 16
    else:
        block_n = max(16, min(32 if backward else 64, 16384 // block_c))
    return {
        "BLOCK_N": block_n,
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_K": 32 if floats else 64,
        "WHOLE": channels <= min(block_c, 256) and not floats,
        "num_warps": 4 if block_t * block_c <= 4096 and not floats and not backward else 8,
        "num_stages": 2,
    }


def merge_table(channels: int) -> dict[str, int]:
    """Block sizes of `token_pool_merge`: a warp's row of floats, eight parts at a time."""
    return {"BLOCK_S": 8, "BLOCK_C": min(max(triton.next_power_of_2(channels), 16), 128), "num_warps": 4}


@triton.jit
def _part_and_tile(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's part and tile of channels. Tiles of the same pixels run side by side and share them in L2."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def _against_pixels(
    rows_ptr, x_ptr, x, token, pixel, m_pixel, T: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products of rows [T, C] with pixels, [BLOCK_T, BLOCK_N]: eq. (1) for the rows of the weight.

    x is the tile of pixels on the chip: all channels if WHOLE.
    """
    if WHOLE:
        channel = tl.arange(0, x.shape[1])
        dots = product(read_tile(rows_ptr, token, token < T, channel, C), tl.trans(x), DOT, PRECISION)
    else:
        dots = tl.zeros([token.shape[0], pixel.shape[0]], dtype=tl.float32)
        for first in range(0, C, BLOCK_K):
            channel = first + tl.arange(0, BLOCK_K)
            rows = read_tile(rows_ptr, token, token < T, channel, C)
            dots += product(rows, tl.trans(read_tile(x_ptr, pixel, m_pixel, channel, C)), DOT, PRECISION)
    return dots


@triton.jit
def token_pool_forward(
    largest_ptr,  # [B, PARTS, T] float, m of each part
    sum_ptr,  # [B, PARTS, T] float, l
    pooled_ptr,  # [B, PARTS, T, C] float, o / l
    x_ptr,  # [B, N, C]
    weight_ptr,  # [T, C] or [B, T, C]
    weight_stride,
    N,
    PARTS,
    T: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Eqs. (1), (3) and (4) over one part of the pixels."""
    part, tile = _part_and_tile(C, BLOCK_C)
    image, begin, end = part_of(part, PARTS, N, BLOCK_N)
    weight_ptr += image * weight_stride
    token = tl.arange(0, BLOCK_T)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    pooled = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        pixel = image * N + n
        x = read_tile(x_ptr, pixel, n < N, channel, C)
        logits = _against_pixels(
            weight_ptr, x_ptr, x, token, pixel, n < N, T, C, DOT, PRECISION, WHOLE, BLOCK_K
        )
        logits = tl.where((n < N)[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # If every logit so far is -inf, there is nothing to scale, and -inf minus -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        share = tl.exp(logits - shift[:, None])
        before = total * tl.exp(largest - shift)
        total = before + tl.sum(share, axis=1)
        inverse = tl.where(total == 0, 0.0, 1 / total)
        pooled = pooled * (before * inverse)[:, None] + product(share * inverse[:, None], x, DOT, PRECISION)
        largest = larger
    row = part * T + token
    write_tile(pooled_ptr, row, token < T, channel, pooled, C)
    if tile == 0:
        tl.store(largest_ptr + row, largest, mask=token < T)
        tl.store(sum_ptr + row, total, mask=token < T)


@triton.jit
def _share_of(part, largest_ptr, sum_ptr, image, token, shift, PARTS, T: tl.constexpr):
    """The shares of these parts of the pixels in a token's sum of exponentials."""
    at = (image * PARTS + part) * T + token
    largest = tl.load(largest_ptr + at, mask=part < PARTS, other=float("-inf"))
    return tl.load(sum_ptr + at, mask=part < PARTS, other=0.0) * tl.exp(largest - shift)


@triton.jit
def token_pool_merge(
    tokens_ptr,  # [B, T, C]
    statistics_ptr,  # [B, 2, T] float, m and l
    largest_ptr,  # [B, PARTS, T]; the parts as written by token_pool_forward
    sum_ptr,
    pooled_ptr,
    PARTS,
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Eq. (4) over all parts, BLOCK_S at a time: one program owns BLOCK_C channels of one token."""
    row = tl.program_id(0).to(tl.int64)
    image, token = row // T, row % T
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    for first in range(0, PARTS, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        at = (image * PARTS + part) * T + token
        largest = tl.maximum(largest, tl.load(largest_ptr + at, mask=part < PARTS, other=float("-inf")))
    all_largest = tl.max(largest, axis=0)
    shift = tl.where(all_largest == float("-inf"), 0.0, all_largest)
    totals = tl.zeros([BLOCK_S], dtype=tl.float32)
    for first in range(0, PARTS, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        totals += _share_of(part, largest_ptr, sum_ptr, image, token, shift, PARTS, T)
    total = tl.sum(totals, axis=0)
    tokens = tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in range(0, PARTS, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        share = _share_of(part, largest_ptr, sum_ptr, image, token, shift, PARTS, T) / total
        pooled = read_tile(pooled_ptr, (image * PARTS + part) * T + token, part < PARTS, channel, C)
        tokens += tl.sum(share[:, None] * pooled, axis=0)
    tl.store(tokens_ptr + row * C + channel, tokens.to(tokens_ptr.dtype.element_ty), mask=channel < C)
    if tl.program_id(1) == 0:
        tl.store(statistics_ptr + image * 2 * T + token, all_largest)
        tl.store(statistics_ptr + image * 2 * T + T + token, total)


@triton.jit
def _deltas(
    grad_output_ptr, tokens_ptr, token, channel, T: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Eq. (5), with tokens in place of a block of pixels: if a token is one pixel, the sums of (6) cancel exactly."""
    delta = tl.zeros([token.shape[0]], dtype=tl.float32)
    for first in range(0, T, BLOCK_N):
        other = first + tl.arange(0, BLOCK_N)
        tokens = read_tile(tokens_ptr, other, other < T, channel, C)
        dots = _against_pixels(
            grad_output_ptr, tokens_ptr, tokens, token, other, other < T, T, C, DOT, PRECISION, WHOLE, BLOCK_K
        )
        delta += tl.sum(tl.where(token[:, None] == other[None, :], dots, 0.0), axis=1)
    return delta


@triton.jit
def token_pool_backward(
    grad_x_ptr,  # [B, N, C]; None if not needed
    grad_weight_ptr,  # [B, PARTS, T, C] float, for each part; None if not needed
    grad_output_ptr,  # [B, T, C]
    tokens_ptr,  # [B, T, C], forward's output
    statistics_ptr,  # [B, 2, T] float, m and l
    x_ptr, weight_ptr, weight_stride, N, PARTS, T: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Eqs. (5) to (9) over one part of the pixels, in one pass."""
    part, tile = _part_and_tile(C, BLOCK_C)
    image, begin, end = part_of(part, PARTS, N, BLOCK_N)
    weight_ptr += image * weight_stride
    grad_output_ptr += image * T * C
    tokens_ptr += image * T * C
    statistics_ptr += image * 2 * T
    token = tl.arange(0, BLOCK_T)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.load(statistics_ptr + token, mask=token < T, other=0.0)
    inverse = 1 / tl.load(statistics_ptr + T + token, mask=token < T, other=1.0)
    delta = _deltas(
        grad_output_ptr, tokens_ptr, token, channel, T, C, DOT, PRECISION, WHOLE, BLOCK_K, BLOCK_N
    )
    grad_weight = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    f_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        pixel = image * N + n
        x = read_tile(x_ptr, pixel, n < N, channel, C)
        logits = _against_pixels(
            weight_ptr, x_ptr, x, token, pixel, n < N, T, C, DOT, PRECISION, WHOLE, BLOCK_K
        )
        dots = _against_pixels(
            grad_output_ptr, x_ptr, x, token, pixel, n < N, T, C, DOT, PRECISION, WHOLE, BLOCK_K
        )
        # Padding tokens and pixels are not 0 if x is infinite or logits are very negative.
        counts = (token < T)[:, None] & (n < N)[None, :]
        attention = tl.where(counts, tl.exp(logits - largest[:, None]) * inverse[:, None], 0.0)
        f = tl.where(counts, attention * (dots - delta[:, None]), 0.0).to(DOT)
        if grad_weight_ptr is not None:
            grad_weight += product(f, x, DOT, PRECISION)
            f_sum += tl.sum(f.to(tl.float32), axis=1)
        if grad_x_ptr is not None:
            grad_output = read_tile(grad_output_ptr, token, token < T, channel, C)
            weight = read_tile(weight_ptr, token, token < T, channel, C)
            grad_x = product(tl.trans(attention), grad_output, DOT, PRECISION)
            grad_x += product(tl.trans(f), weight, DOT, PRECISION)
            write_tile(grad_x_ptr, pixel, n < N, channel, grad_x, C)
    if grad_weight_ptr is not None:
        grad_weight -= f_sum[:, None] * read_tile(tokens_ptr, token, token < T, channel, C).to(tl.float32)
        write_tile(grad_weight_ptr, part * T + token, token < T, channel, grad_weight, C)
