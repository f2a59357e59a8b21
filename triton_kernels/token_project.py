# SPDX-License-Identifier: Apache-2.0
"""Projection of tokens back to pixels, eqs. (1) to (6) of docs/derivations/token_project.md.

Shapes: B images, N pixels, C channels, T tokens, K channels of a query or key.

Work split: one program takes BLOCK_N pixels of one image and all tokens, and keeps their attention on the chip. It
loops over tiles of K for the logits, then over tiles of channels. Backward writes the attention and the gradient of its
logits, [B, N, T]; `tiles.row_products` multiplies them with grad_output and the queries.
Memory: a program reads x, queries and grad_output once and writes results once; keys and tokens come from L2.
Offsets of pixels are int64.
Numerics: logits, softmax and sums are float; the factors of products have the type of x. No exponent is positive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import product, read_tile, write_tile

MAX_TOKENS = 512  # more do not fit the registers of one program


def launch_table(tokens: int, item_bytes: int) -> dict[str, int]:
    """Block sizes, chosen by static figures (registers, spills, shared memory), not measured on a card."""
    block_t = max(triton.next_power_of_2(tokens), 16)
    return {
        "BLOCK_N": max(16, min(64, 8192 // block_t) if item_bytes == 2 else min(32, 4096 // block_t)),
        "BLOCK_T": block_t,
        "BLOCK_C": 64 if item_bytes == 2 else 32,
        "num_warps": 4 if block_t <= 64 else 8,
        "num_stages": 3 if block_t <= 128 else 2,
    }


@triton.jit
def _dots(
    left_ptr, right_ptr, pixel, m_pixel, token, WIDTH: tl.constexpr, T: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Dot products of the pixels' rows with the tokens' rows, [BLOCK_N, BLOCK_T]."""
    dots = tl.zeros([pixel.shape[0], token.shape[0]], dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        left = read_tile(left_ptr, pixel, m_pixel, column, WIDTH)
        right = read_tile(right_ptr, token, token < T, column, WIDTH)
        dots += product(left, tl.trans(right), DOT, PRECISION)
    return dots


@triton.jit
def _attention(
    query_ptr, key_ptr, pixel, m_pixel, token, K: tl.constexpr, T: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. (1): P of a block of pixels; zeros for padding tokens."""
    logits = _dots(query_ptr, key_ptr, pixel, m_pixel, token, K, T, DOT, PRECISION, BLOCK_C)
    logits = tl.where((token < T)[None, :], logits, float("-inf"))
    shares = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    attention = shares / tl.sum(shares, axis=1)[:, None]
    return tl.where((token < T)[None, :], attention, 0.0)


@triton.jit
def _pixels(N, BLOCK_N: tl.constexpr):
    """This program's image, and its pixels in the image and in the batch."""
    blocks = tl.cdiv(N, BLOCK_N)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return image, n, image * N + n


@triton.jit
def token_project_forward(
    output_ptr,  # [B, N, C]
    x_ptr,  # [B, N, C]
    query_ptr,  # [B, N, K]
    key_ptr,  # [B, T, K]
    tokens_ptr,  # [B, T, C]
    N,
    C: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Eqs. (1) and (2)."""
    image, n, pixel = _pixels(N, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    attention = _attention(
        query_ptr, key_ptr + image * T * K, pixel, n < N, token, K, T, DOT, PRECISION, BLOCK_C
    )
    attention = attention.to(DOT)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        tokens = read_tile(tokens_ptr + image * T * C, token, token < T, channel, C)
        y = product(attention, tokens, DOT, PRECISION)
        y += read_tile(x_ptr, pixel, n < N, channel, C).to(tl.float32)
        write_tile(output_ptr, pixel, n < N, channel, y, C)


@triton.jit
def token_project_backward(
    grad_query_ptr,  # [B, N, K]; None if not needed, as all outputs
    attention_ptr,  # [B, N, T], P
    f_ptr,  # [B, N, T]
    grad_output_ptr,  # [B, N, C]
    query_ptr, key_ptr, tokens_ptr, N, C: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eqs. (3) to (5)."""
    image, n, pixel = _pixels(N, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    key_ptr += image * T * K
    attention = _attention(query_ptr, key_ptr, pixel, n < N, token, K, T, DOT, PRECISION, BLOCK_C)
    if attention_ptr is not None:
        write_tile(attention_ptr, pixel, n < N, token, attention, T)
    if grad_query_ptr is not None or f_ptr is not None:
        h = _dots(
            grad_output_ptr, tokens_ptr + image * T * C, pixel, n < N, token, C, T, DOT, PRECISION, BLOCK_C
        )
        h = tl.where((token < T)[None, :], h, 0.0)  # padding is NaN if a gradient is infinite
        f = attention * (h - tl.sum(attention * h, axis=1)[:, None])
        if f_ptr is not None:
            write_tile(f_ptr, pixel, n < N, token, f, T)
        if grad_query_ptr is not None:
            f = tl.where((token < T)[None, :], f, 0.0).to(DOT)
            for first in range(0, K, BLOCK_C):
                column = first + tl.arange(0, BLOCK_C)
                key = read_tile(key_ptr, token, token < T, column, K)
                write_tile(grad_query_ptr, pixel, n < N, column, product(f, key, DOT, PRECISION), K)
