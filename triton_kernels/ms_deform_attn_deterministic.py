# SPDX-License-Identifier: Apache-2.0
"""The bitwise reproducible gradient of value: docs/derivations/ms_deform_attn.md, "Deterministic".

``ms_deform_attn_cells`` numbers each sampling point by the cell of the pixel grid that it falls in, the caller sorts
the points by that number (stably), and ``ms_deform_attn_gather_grad_value`` sums, pixel by pixel, the points of the
pixel's cells in their sorted order. No atomics; shapes and names as in ms_deform_attn.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ms_deform_attn import _level, _locate, _queries, _tile_mask


@triton.jit
def ms_deform_attn_cells(
    cells_ptr,  # [B, Q, M, K] int64: in [0, B * M * 4 * S), or that bound for a point that touches no pixel
    shapes_ptr,
    level_start_ptr,
    level_of_group_ptr,
    locations_ptr,
    B,
    S,
    M,
    Q,
    GROUPS: tl.constexpr,
    GROUP_POINTS: tl.constexpr,
    BILINEAR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Numbers each point by the cell between four pixels, or the pixel, that it falls in ("Deterministic").

    A level of W x H pixels has (W + 1) * (H + 1) <= 4 * W * H cells, so level l of S pixels starts at cell 4 * start.
    """
    image, head, row, m_q = _queries(M, Q, BLOCK_Q)
    for group in range(GROUPS):
        height, width, start = _level(group, level_of_group_ptr, shapes_ptr, level_start_ptr)
        for step in range(GROUP_POINTS):
            point = (row * GROUPS + group) * GROUP_POINTS + step
            counts, left, top, _, _ = _locate(locations_ptr, point, m_q, height, width, BILINEAR, ACC)
            cell = (top + 1).to(tl.int64) * (width + 1) + (left + 1)
            cell = tl.where(counts, ((image * M + head) * S + start) * 4 + cell, 4 * S * M * B)
            tl.store(cells_ptr + point, cell, mask=m_q)


@triton.jit
def ms_deform_attn_gather_grad_value(
    grad_value_ptr,  # [B, S, M, D] of ACC, written
    grad_output_ptr,  # [B, Q, M, D]
    shapes_ptr,  # [L, 2]
    level_start_ptr,  # [L]
    locations_ptr,  # [B, Q, M, K, 2]
    weights_ptr,  # [B, Q, M, K]
    order_ptr,  # [B * Q * M * K] points in the order of their cells
    first_ptr,  # [B * M * 4 * S + 1] how many points are in the cells below
    S,
    M,
    D: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    BILINEAR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Eq. (5) without atomics: one program sums, for BLOCK_S pixels of one head, the points of their cells in order.

    A pixel is a corner of two cells in each of two rows; the two of a row follow each other, and so do their points.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_S)
    head = (program % M).to(tl.int64)
    image = (program // M // blocks).to(tl.int64)
    pixel = (program // M % blocks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = pixel < S
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    height, width, start = _level_of_pixel(pixel, shapes_ptr, level_start_ptr, L)
    in_level = m_s & (width > 0)
    row = (pixel - start) // tl.maximum(width, 1)
    column = (pixel - start) - row * width
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC)
    for down in tl.static_range(2 if BILINEAR else 1):
        # Nearest: the pixel is its own cell. Bilinear: the cells above left and above, then left and below.
        cell_row = row + down if BILINEAR else row + 1
        cell_column = column if BILINEAR else column + 1
        cell = ((image * M + head) * S + start) * 4 + cell_row * (width + 1) + cell_column
        i = tl.load(first_ptr + cell, mask=in_level, other=0)
        end = tl.load(first_ptr + cell + (2 if BILINEAR else 1), mask=in_level, other=0)
        longest = tl.max(end - i, axis=0)
        while longest > 0:
            m_i = i < end
            point = tl.load(order_ptr + i, mask=m_i, other=0)
            share = tl.load(weights_ptr + point, mask=m_i, other=0.0).to(ACC)
            if BILINEAR:
                x = tl.load(locations_ptr + 2 * point, mask=m_i, other=0.0).to(ACC) * width.to(ACC) - 0.5
                y = tl.load(locations_ptr + 2 * point + 1, mask=m_i, other=0.0).to(ACC) * height.to(ACC) - 0.5
                share *= (1 - tl.abs(x - column.to(ACC))) * (1 - tl.abs(y - row.to(ACC)))
            grad_row = tl.load(
                grad_output_ptr + (point // K * D)[:, None] + channel[None, :],
                mask=_tile_mask(m_i, channel, D, BLOCK_D),
                other=0.0,
            )
            total += tl.where(m_i, share, 0.0)[:, None] * grad_row.to(ACC)
            i += 1
            longest -= 1
    grad_ptr = grad_value_ptr + (((image * S + pixel) * M + head) * D)[:, None] + channel[None, :]
    tl.store(grad_ptr, total, mask=_tile_mask(m_s, channel, D, BLOCK_D))


@triton.jit
def _level_of_pixel(pixel, shapes_ptr, level_start_ptr, L: tl.constexpr):
    """Height, width and first pixel of the level that each pixel belongs to; zeros where it belongs to none."""
    height = tl.zeros_like(pixel)
    width = tl.zeros_like(pixel)
    start = tl.zeros_like(pixel)
    for level in range(L):
        level_height, level_width, first = _level(level, None, shapes_ptr, level_start_ptr)
        mine = (pixel >= first) & (pixel < first + level_height.to(tl.int64) * level_width)
        height = tl.where(mine, level_height, height)
        width = tl.where(mine, level_width, width)
        start = tl.where(mine, first, start)
    return height, width, start
