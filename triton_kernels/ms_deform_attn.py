# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention, eqs. (1) to (7) of docs/derivations/ms_deform_attn.md.

Shapes: B images, S pixels of all levels, M heads, D channels of a head, Q queries, K sampling points of a query and
head. The points come in GROUPS runs of GROUP_POINTS that share a level: one run a level where all levels have the same
number of points, else runs of their greatest common divisor and a table that tells the level of each.

Work split: one program handles BLOCK_Q queries of one head of one image and loops over levels and points. Coordinates
are vectors over the queries; only samples are [BLOCK_Q, BLOCK_D] tiles, with the channels in 16-byte loads.
Memory: locations and weights are read once; a query's corners are gathered from value, which lives in L2.
Numerics: everything is computed in ACC (float, double for double). Range tests are the ones that NaN fails, and a
corner outside its level is neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl


def launch_table(channels: int, item_bytes: int) -> dict[str, int]:
    """Block sizes that give each thread one 16-byte vector of one query.

    Chosen by static figures, not measured on a card: one vector a thread keeps the forward at or under 64 registers
    and the backward under 96, without spills, on sm_80 to sm_120 (tests/test_triton_aot.py holds them there).
    A table, because a run-time search would add into live gradients and break the capture of CUDA graphs.
    """
    num_warps = 4
    block_d = min(triton.next_power_of_2(channels), 256)
    vector = min(16 // item_bytes, block_d)
    block_q = max(1, 32 * num_warps * vector // block_d)
    return {"BLOCK_Q": block_q, "BLOCK_D": block_d, "num_warps": num_warps}


@triton.jit
def _queries(M, Q, BLOCK_Q: tl.constexpr):
    """This program's image, head and rows of [B, Q, M]. Heads vary fastest: neighbours share lines of all inputs."""
    program = tl.program_id(0)
    blocks = tl.cdiv(Q, BLOCK_Q)
    head = (program % M).to(tl.int64)
    image = (program // M // blocks).to(tl.int64)
    query = (program // M % blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return image, head, (image * Q + query) * M + head, query < Q


@triton.jit
def _level(group, level_of_group_ptr, shapes_ptr, level_start_ptr):
    """Height, width and first pixel of the level that a run of points samples."""
    level = group
    if level_of_group_ptr is not None:
        level = tl.load(level_of_group_ptr + group)
    height = tl.load(shapes_ptr + 2 * level).to(tl.int32)
    width = tl.load(shapes_ptr + 2 * level + 1).to(tl.int32)
    return height, width, tl.load(level_start_ptr + level)


@triton.jit
def _locate(locations_ptr, point, m_point, height, width, BILINEAR: tl.constexpr, ACC: tl.constexpr):
    """Eqs. (2) and (4): does the point count, its upper left pixel, its shares of the right and of the lower pixels."""
    x = tl.load(locations_ptr + 2 * point, mask=m_point, other=0.0).to(ACC) * width
    y = tl.load(locations_ptr + 2 * point + 1, mask=m_point, other=0.0).to(ACC) * height
    if BILINEAR:
        x -= 0.5
        y -= 0.5
        counts = m_point & (x > -1) & (x < width) & (y > -1) & (y < height)
        x = tl.where(counts, x, 0.0)
        y = tl.where(counts, y, 0.0)
    else:
        x += 0.5
        y += 0.5
        counts = m_point & (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
        x = tl.floor(tl.minimum(tl.maximum(tl.where(counts, x, 0.0), 0.0), (width - 1).to(ACC)))
        y = tl.floor(tl.minimum(tl.maximum(tl.where(counts, y, 0.0), 0.0), (height - 1).to(ACC)))
        counts = counts & (x >= 0) & (y >= 0)  # -1 in a level without pixels
    left = tl.floor(x)
    top = tl.floor(y)
    return counts, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _corner(CORNER: tl.constexpr, counts, left, top, right_share, lower_share, height, width):
    """Eq. (3): is the corner inside, its pixel of the level, its coefficient and that one's slopes along x and y.

    Corners 0 and 1 are left and right of the upper row, 2 and 3 of the lower. A point that counts has its left column
    in [-1, width - 1], so that one comparison a column and a row is enough.
    """
    if CORNER % 2 == 0:
        column, column_share, column_slope = left, 1 - right_share, -1.0
        inside = counts & (column >= 0)
    else:
        column, column_share, column_slope = left + 1, right_share, 1.0
        inside = counts & (column < width)
    if CORNER // 2 == 0:
        row, row_share, row_slope = top, 1 - lower_share, -1.0
        inside = inside & (row >= 0)
    else:
        row, row_share, row_slope = top + 1, lower_share, 1.0
        inside = inside & (row < height)
    pixel = row.to(tl.int64) * width + column
    return inside, pixel, column_share * row_share, column_slope * row_share, row_slope * column_share


@triton.jit
def ms_deform_attn_forward(
    output_ptr,  # [B, Q, M, D]
    value_ptr,  # [B, S, M, D]
    shapes_ptr,  # [L, 2] as (height, width)
    level_start_ptr,  # [L]
    level_of_group_ptr,  # [GROUPS], None where group and level are the same
    locations_ptr,  # [B, Q, M, K, 2] as (x, y)
    weights_ptr,  # [B, Q, M, K]
    S,
    M,
    Q,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_POINTS: tl.constexpr,
    BILINEAR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Eq. (1). The second axis of the grid goes over blocks of channels."""
    image, head, row, m_q = _queries(M, Q, BLOCK_Q)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = channel < D
    corners: tl.constexpr = 4 if BILINEAR else 1

    output = tl.zeros([BLOCK_Q, BLOCK_D], dtype=ACC)
    for group in range(GROUPS):
        height, width, start = _level(group, level_of_group_ptr, shapes_ptr, level_start_ptr)
        level_ptr = value_ptr + ((image * S + start) * M + head) * D
        for step in range(GROUP_POINTS):
            point = (row * GROUPS + group) * GROUP_POINTS + step
            weight = tl.load(weights_ptr + point, mask=m_q, other=0.0).to(ACC)
            counts, left, top, right_share, lower_share = _locate(
                locations_ptr, point, m_q, height, width, BILINEAR, ACC
            )
            for corner in tl.static_range(corners):
                inside, pixel, coefficient, _, _ = _corner(
                    corner, counts, left, top, right_share, lower_share, height, width
                )
                sample = tl.load(
                    level_ptr + (pixel * (M * D))[:, None] + channel[None, :],
                    mask=inside[:, None] & m_d[None, :],
                    other=0.0,
                )
                # A weight that is infinite or NaN must not turn the zero of a corner outside into a NaN.
                output += tl.where(inside, weight * coefficient, 0.0)[:, None] * sample.to(ACC)
    tl.store(
        output_ptr + (row * D)[:, None] + channel[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=m_q[:, None] & m_d[None, :],
    )


@triton.jit
def ms_deform_attn_backward(
    grad_value_ptr,  # [B, S, M, D] of ACC, added to; a gradient that nobody wants is None
    grad_locations_ptr,  # [B, Q, M, K, 2]
    grad_weights_ptr,  # [B, Q, M, K]
    grad_output_ptr,  # [B, Q, M, D]
    value_ptr,  # the rest as in forward
    shapes_ptr,
    level_start_ptr,
    level_of_group_ptr,
    locations_ptr,
    weights_ptr,
    S,
    M,
    Q,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_POINTS: tl.constexpr,
    BILINEAR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Eqs. (5), (6) and (7). The dot product of a corner with grad_output serves both weights and locations."""
    image, head, row, m_q = _queries(M, Q, BLOCK_Q)
    corners: tl.constexpr = 4 if BILINEAR else 1
    grad_output = _channels(grad_output_ptr, row, 0, m_q, D, BLOCK_D, ACC)
    for group in range(GROUPS):
        height, width, start = _level(group, level_of_group_ptr, shapes_ptr, level_start_ptr)
        level_row = (image * S + start) * M + head
        for step in range(GROUP_POINTS):
            point = (row * GROUPS + group) * GROUP_POINTS + step
            weight = tl.load(weights_ptr + point, mask=m_q, other=0.0).to(ACC)
            counts, left, top, right_share, lower_share = _locate(
                locations_ptr, point, m_q, height, width, BILINEAR, ACC
            )
            grad_weight = tl.zeros([BLOCK_Q], dtype=ACC)
            grad_x = tl.zeros([BLOCK_Q], dtype=ACC)
            grad_y = tl.zeros([BLOCK_Q], dtype=ACC)
            for corner in tl.static_range(corners):
                inside, pixel, coefficient, x_slope, y_slope = _corner(
                    corner, counts, left, top, right_share, lower_share, height, width
                )
                value_row = level_row + pixel * M
                dot = tl.zeros([BLOCK_Q], dtype=ACC)
                for first in range(0, D, BLOCK_D):
                    if D > BLOCK_D:
                        grad_output = _channels(grad_output_ptr, row, first, m_q, D, BLOCK_D, ACC)
                    if grad_value_ptr is not None:
                        _add(grad_value_ptr, value_row, first, inside, (weight * coefficient)[:, None] * grad_output, D)
                    if grad_locations_ptr is not None or grad_weights_ptr is not None:
                        sample = _channels(value_ptr, value_row, first, inside, D, BLOCK_D, ACC)
                        dot += tl.sum(sample * grad_output, axis=1)
                # A NaN of grad_output times the zero of a corner outside is not a gradient.
                dot = tl.where(inside, dot, 0.0)
                grad_weight += coefficient * dot
                if BILINEAR:
                    grad_x += x_slope * dot
                    grad_y += y_slope * dot
            if grad_weights_ptr is not None:
                tl.store(grad_weights_ptr + point, grad_weight.to(grad_weights_ptr.dtype.element_ty), mask=m_q)
            if grad_locations_ptr is not None:
                grad_x = tl.where(counts, grad_x * weight * width, 0.0)
                grad_y = tl.where(counts, grad_y * weight * height, 0.0)
                tl.store(grad_locations_ptr + 2 * point, grad_x.to(grad_locations_ptr.dtype.element_ty), mask=m_q)
                tl.store(grad_locations_ptr + 2 * point + 1, grad_y.to(grad_locations_ptr.dtype.element_ty), mask=m_q)


@triton.jit
def _channels(ptr, row, first, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Channels [first, first + BLOCK_D) of some rows of [.., D], as ACC."""
    channel = first + tl.arange(0, BLOCK_D)
    mask = m_row[:, None] & (channel < D)[None, :]
    return tl.load(ptr + (row * D)[:, None] + channel[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _add(ptr, row, first, m_row, tile, D: tl.constexpr):
    """Adds a tile into channels [first, ..) of some rows of [.., D]; rows may repeat."""
    channel = first + tl.arange(0, tile.shape[1])
    mask = m_row[:, None] & (channel < D)[None, :]
    tl.atomic_add(ptr + (row * D)[:, None] + channel[None, :], tile, mask=mask, sem="relaxed")


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
    m_d = channel < D

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
                mask=m_i[:, None] & m_d[None, :],
                other=0.0,
            )
            total += tl.where(m_i, share, 0.0)[:, None] * grad_row.to(ACC)
            i += 1
            longest -= 1
    grad_ptr = grad_value_ptr + (((image * S + pixel) * M + head) * D)[:, None] + channel[None, :]
    tl.store(grad_ptr, total, mask=m_s[:, None] & m_d[None, :])


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
