# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention, eqs. (1) to (4) of docs/derivations/ms_deform_attn.md.

Shapes: B images, S pixels of all levels, M heads, D channels of a head, Q queries, K sampling points of a query and
head. The points come in GROUPS groups of GROUP_POINTS that share a level: one group a level if all levels have the same
number of points, else groups of their greatest common divisor, with a table of the level of each group.

Work split: one program handles BLOCK_Q queries of one head of one image and loops over levels and points. Coordinates
are vectors over the queries; samples are [BLOCK_Q, BLOCK_D] tiles, in which each thread holds one vector of one query.
Memory: locations and weights are read once; the corners of a query are gathered from value, which stays in L2.
Offsets within an image are OFFSET (int32 if an image is small enough), all other offsets are int64.
Numerics: everything is computed in ACC (float; double while interpreting). NaN fails every range test, and a
corner outside its level is neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ms_deform_attn_fused import _frame, _softmax


def launch_table(channels: int, item_bytes: int, backward: bool = False) -> dict[str, int]:
    """Block sizes that give each thread one vector of one query: 16 bytes of value, or in backward of grad_value.

    Chosen by static figures (docs/benchmarking.md), not measured on a card. A wider 16-bit tile in backward would cross
    shared memory on its way to the vector atomics. By default ptxas limits the forward to 48 registers, spills in
    16-bit and waits for each corner before it loads the next. With 64 registers, all four loads are in flight together
    and half of an SM's threads still fit. Channels that do not fill their block need more registers and have no limit.
    This is a table because a search at run time would add into live gradients and break the capture of CUDA graphs.
    """
    num_warps = 4
    block_d = min(max(triton.next_power_of_2(channels), 2), 256)
    vector = min(16 // (4 if backward else item_bytes), block_d)
    block_q = max(1, 32 * num_warps * vector // block_d)
    registers = {"maxnreg": 64} if channels % block_d == 0 and not backward else {}
    return {"BLOCK_Q": block_q, "BLOCK_D": block_d, "num_warps": num_warps, **registers}


@triton.jit
def _queries(M, Q, BLOCK_Q: tl.constexpr):
    """This program's image, head, queries and their rows of [B, Q, M].

    Heads vary fastest: programs that run side by side then share the cache lines of all inputs.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(Q, BLOCK_Q)
    head = (program % M).to(tl.int64)
    image = (program // M // blocks).to(tl.int64)
    query = (program // M % blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return image, head, query, (image * Q + query) * M + head


@triton.jit
def _level_of(group, level_of_group_ptr):
    """The level of a group of points."""
    level = group
    if level_of_group_ptr is not None:
        level = tl.load(level_of_group_ptr + group)
    return level


@triton.jit
def _level(level, shapes_ptr, level_start_ptr):
    """Height, width and first pixel of a level. A level without pixels is -1 x 0: -1 < y < -1 is never true."""
    height = tl.load(shapes_ptr + 2 * level)
    width = tl.load(shapes_ptr + 2 * level + 1)
    empty = (height <= 0) | (width <= 0)
    height = tl.where(empty, -1, height).to(tl.int32)
    return height, tl.where(empty, 0, width).to(tl.int32), tl.load(level_start_ptr + level)


@triton.jit
def _locate(
    locations_ptr, point, m_point, height, width, x_shift, y_shift, x_scale, y_scale,
    NUMBERS: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Eqs. (2) and (4): whether a point counts, its upper left pixel, its shares of the right and the lower pixels."""
    xy = tl.load(
        locations_ptr + 2 * point[:, None] + tl.arange(0, 2)[None, :], mask=m_point[:, None], other=0.0
    )
    x, y = tl.split(xy.to(ACC))
    x *= x_scale
    y *= y_scale
    if NUMBERS > 0:
        x += x_shift
        y += y_shift
    if BILINEAR:
        # Two comparisons through a select: four joined by "and" compile to fifteen instructions.
        x = tl.where(x - 0.5 < width, x - 0.5, -1.0)
        y = tl.where(y - 0.5 < height, y - 0.5, -1.0)
        counts = m_point & (x > -1) & (y > -1)
        x = tl.where(counts, x, 0.0)
        y = tl.where(counts, y, 0.0)
    else:
        finite = m_point & (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
        x = tl.floor(tl.minimum(tl.maximum(tl.where(finite, x + 0.5, 0.0), 0.0), (width - 1).to(ACC)))
        y = tl.floor(tl.minimum(tl.maximum(tl.where(finite, y + 0.5, 0.0), 0.0), (height - 1).to(ACC)))
        counts = finite & (x >= 0) & (y >= 0)  # below 0 in a level without pixels
    left = tl.floor(x)
    top = tl.floor(y)
    column, row = left.to(tl.int32), top.to(tl.int32)
    if not BILINEAR:  # the bounds above are rounded if a size has more digits than ACC
        column, row = tl.minimum(column, width - 1), tl.minimum(row, height - 1)
    return counts, column, row, x - left, y - top


@triton.jit
def _corner(CORNER: tl.constexpr, counts, left, top, right, lower, height, width):
    """Eq. (3): whether the corner is inside, its coefficient, and the coefficient's slopes along x and y.

    Corners 0 and 1 are left and right of the upper row, 2 and 3 of the lower. A point that counts has its left column
    in [-1, width - 1]: one comparison for the column and one for the row are enough.
    """
    if CORNER % 2 == 0:
        column_share, column_slope = 1 - right, -1.0
        inside = counts & (left >= 0)
    else:
        column_share, column_slope = right, 1.0
        inside = counts & (left + 1 < width)
    if CORNER // 2 == 0:
        row_share, row_slope = 1 - lower, -1.0
        inside = inside & (top >= 0)
    else:
        row_share, row_slope = lower, 1.0
        inside = inside & (top + 1 < height)
    return inside, column_share * row_share, column_slope * row_share, row_slope * column_share


@triton.jit
def _tile_mask(m_row, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of a tile of rows and channels, or of rows only if all blocks of channels are full."""
    mask = m_row[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (channel < D)[None, :]
    return mask


@triton.jit
def _channels(ptr, offset, m_row, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels of the rows at these offsets."""
    return tl.load(
        ptr + channel[None, :] + offset[:, None], mask=_tile_mask(m_row, channel, D, BLOCK_D), other=0.0
    )


@triton.jit
def ms_deform_attn_forward(
    output_ptr,  # [B, Q, M, D]
    value_ptr,  # [B, S, M, D]
    shapes_ptr,  # [L, 2] as (height, width)
    level_start_ptr,  # [L]
    level_of_group_ptr,  # [GROUPS], then the points of each level [L]; None if group and level are the same
    locations_ptr,  # [B, Q, M, K, 2] as (x, y); in the fused form, offsets
    weights_ptr,  # [B, Q, M, K]; in the fused form, logits
    reference_ptr,  # [B | 1, Q, L | 1, NUMBERS] of ACC, stride 0 along an axis of 1; in the plain form, None
    reference_image,  # strides
    reference_query,
    reference_level,
    S,
    M,
    Q,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_POINTS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BILINEAR: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Eq. (1). The second axis of the grid goes over blocks of channels."""
    image, head, query, row = _queries(M, Q, BLOCK_Q)
    m_q = query < Q
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    output = tl.zeros([BLOCK_Q, BLOCK_D], dtype=ACC)
    if NUMBERS > 0:
        K: tl.constexpr = GROUPS * GROUP_POINTS
        largest, inverse = _softmax(weights_ptr, row, m_q, K, K <= 64, ACC)
    for group in range(GROUPS):
        level = _level_of(group, level_of_group_ptr)
        height, width, start = _level(level, shapes_ptr, level_start_ptr)
        origin = ((image * S + start) * M + head) * D
        x_shift, y_shift, x_scale, y_scale = _frame(
            reference_ptr, reference_image, reference_query, reference_level, image, query, m_q, level,
            level_of_group_ptr, height, width, GROUPS, GROUP_POINTS, NUMBERS, ACC,
        )  # fmt: skip
        for step in range(GROUP_POINTS):
            point = row * (GROUPS * GROUP_POINTS) + (group * GROUP_POINTS + step)
            weight = tl.load(weights_ptr + point, mask=m_q, other=0.0).to(ACC)
            if NUMBERS > 0:
                weight = tl.exp(weight - largest) * inverse
            counts, left, top, right, lower = _locate(
                locations_ptr, point, m_q, height, width, x_shift, y_shift, x_scale, y_scale,
                NUMBERS, BILINEAR, ACC,
            )  # fmt: skip
            pixel = top.to(OFFSET) * width + left
            for corner in tl.static_range(4 if BILINEAR else 1):
                inside, coefficient, _, _ = _corner(corner, counts, left, top, right, lower, height, width)
                offset = (pixel + (corner % 2 + corner // 2 * width)) * (M * D)
                sample = _channels(value_ptr + origin, offset, inside, channel, D, BLOCK_D)
                # An infinite or NaN weight times the zero of a corner outside would be NaN.
                output += tl.where(inside, weight * coefficient, 0.0)[:, None] * sample.to(ACC)
    target = output_ptr + (row * D)[:, None] + channel[None, :]
    tl.store(target, output.to(output_ptr.dtype.element_ty), mask=_tile_mask(m_q, channel, D, BLOCK_D))
