# SPDX-License-Identifier: Apache-2.0
"""grad_value without atomics, eq. (5), bitwise reproducible ("Deterministic" in the derivation).

The cell of a sampling point is the last pixel, in memory order, that it touches. ``ms_deform_attn_cells`` computes the
cells; the caller sorts the points by cell, stably; ``ms_deform_attn_gather_grad_value`` sums for each pixel the points
that touch it. Their cells are the pixel itself and its neighbours to the right, below, and both: two runs of the sorted
order, because neighbours in a row are neighbours in that order. Shapes and names are those of ms_deform_attn.py. In the
fused form the points of a pixel come from many rows of logits; the first kernel writes the softmax of each row as two
numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ms_deform_attn import _channels, _level, _level_of, _locate, _queries, _tile_mask
from .ms_deform_attn_fused import _frame, _softmax


@triton.jit
def ms_deform_attn_cells(
    cells_ptr,  # [B, Q, M, K] int64: in [0, B * M * S), or B * M * S if a point touches no pixel
    softmax_ptr,  # [B, Q, M, 2] of ACC, fused form only: the largest logit, and 1 / total of eq. (8)
    shapes_ptr, level_start_ptr, level_of_group_ptr, locations_ptr, weights_ptr,
    reference_ptr, reference_image, reference_query, reference_level, B, S, M, Q, GROUPS: tl.constexpr,
    GROUP_POINTS: tl.constexpr, NUMBERS: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program computes the cells of the points of BLOCK_Q queries of one head of one image."""
    image, head, query, row = _queries(M, Q, BLOCK_Q)
    m_q = query < Q
    nowhere = tl.cast(S, tl.int64) * M * B
    if NUMBERS > 0:
        largest, inverse = _softmax(weights_ptr, row, m_q, GROUPS * GROUP_POINTS, False, ACC)
        tl.store(softmax_ptr + 2 * row, largest, mask=m_q)
        tl.store(softmax_ptr + 2 * row + 1, inverse, mask=m_q)
    for group in range(GROUPS):
        level = _level_of(group, level_of_group_ptr)
        height, width, start = _level(level, shapes_ptr, level_start_ptr)
        x_shift, y_shift, x_scale, y_scale = _frame(
            reference_ptr, reference_image, reference_query, reference_level, image, query, m_q, level,
            level_of_group_ptr, height, width, GROUPS, GROUP_POINTS, NUMBERS, ACC,
        )  # fmt: skip
        for step in range(GROUP_POINTS):
            point = row * (GROUPS * GROUP_POINTS) + (group * GROUP_POINTS + step)
            counts, column, line, _, _ = _locate(
                locations_ptr, point, m_q, height, width, x_shift, y_shift, x_scale, y_scale,
                NUMBERS, BILINEAR, ACC,
            )  # fmt: skip
            if BILINEAR:
                column = tl.minimum(column + 1, width - 1)
                line = tl.minimum(line + 1, height - 1)
            pixel = (image * M + head) * S + start + line.to(tl.int64) * width + column
            tl.store(cells_ptr + point, tl.where(counts, pixel, nowhere), mask=m_q)


@triton.jit
def ms_deform_attn_gather_grad_value(
    grad_value_ptr,  # [B, S, M, D] of ACC, all of it written
    grad_output_ptr,  # [B, Q, M, D]
    softmax_ptr,  # [B, Q, M, 2]
    order_ptr,  # [B * Q * M * K] points, sorted by cell
    first_ptr,  # [B * M * S + 1] number of points in the cells before
    shapes_ptr, level_start_ptr, level_of_group_ptr, locations_ptr, weights_ptr,
    reference_ptr, reference_image, reference_query, reference_level, S, M, Q, D: tl.constexpr,
    L: tl.constexpr, GROUPS: tl.constexpr, GROUP_POINTS: tl.constexpr, NUMBERS: tl.constexpr,
    BILINEAR: tl.constexpr, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_S pixels and BLOCK_D channels of one head; each pixel adds one point an iteration."""
    image, head, pixel, target = _queries(M, S, BLOCK_S)
    m_s = pixel < S
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC)
    for level in range(L):
        height, width, start = _level(level, shapes_ptr, level_start_ptr)
        in_level = pixel - start
        inside = m_s & (in_level >= 0) & (in_level < height.to(tl.int64) * width)
        line = in_level // tl.maximum(width, 1)
        column = in_level - line * width
        for down in tl.static_range(2 if BILINEAR else 1):
            m_run = inside & (line + down < height)
            cell = first_ptr + (image * M + head) * S + pixel + down * width
            cells = 1
            if BILINEAR:
                cells = tl.where(column + 1 < width, 2, 1)
            i = tl.load(cell, mask=m_run, other=0)
            end = tl.load(cell + cells, mask=m_run, other=0)
            rounds = tl.max(end - i, axis=0)
            while rounds > 0:
                point = tl.load(order_ptr + i, mask=i < end, other=0)
                row = point // (GROUPS * GROUP_POINTS)
                weight = tl.load(weights_ptr + point, mask=i < end, other=0.0).to(ACC)
                if NUMBERS > 0:
                    largest = tl.load(softmax_ptr + 2 * row, mask=i < end, other=0.0)
                    weight = tl.exp(weight - largest) * tl.load(
                        softmax_ptr + 2 * row + 1, mask=i < end, other=0.0
                    )
                x_shift, y_shift, x_scale, y_scale = _frame(
                    reference_ptr, reference_image, reference_query, reference_level, image, row // M - image * Q,
                    i < end, level, level_of_group_ptr, height, width, GROUPS, GROUP_POINTS, NUMBERS, ACC,
                )  # fmt: skip
                counts, left, top, right, lower = _locate(
                    locations_ptr, point, i < end, height, width, x_shift, y_shift, x_scale, y_scale,
                    NUMBERS, BILINEAR, ACC,
                )  # fmt: skip
                # Levels that overlap share pixels, but a point counts once.
                group = point % (GROUPS * GROUP_POINTS) // GROUP_POINTS
                takes = counts & (_level_of(group, level_of_group_ptr) == level)
                takes = takes & (column - left >= 0) & (column - left <= 1)
                takes = takes & (line - top >= 0) & (line - top <= 1)
                share = tl.where(column == left, 1 - right, right) * tl.where(line == top, 1 - lower, lower)
                grad_output = _channels(grad_output_ptr, row * D, takes, channel, D, BLOCK_D).to(ACC)
                total += tl.where(takes, weight * share, 0.0)[:, None] * grad_output
                i += 1
                rounds -= 1
    target = grad_value_ptr + (target * D)[:, None] + channel[None, :]
    tl.store(target, total, mask=_tile_mask(m_s, channel, D, BLOCK_D))
