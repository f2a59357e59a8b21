# SPDX-License-Identifier: Apache-2.0
"""Gradients of multi-scale deformable attention, eqs. (5) to (7), (11) and (12) of the derivation.

Shapes, names and work split are those of ms_deform_attn.py: one program handles BLOCK_Q queries of one head and all of
their channels. Gradients of value are added in memory, by vector atomics if the card has them. All other gradients are
collected in registers and stored a group at a time, in the fused form a row of logits at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ms_deform_attn import _channels, _corner, _level, _level_of, _locate, _queries, _tile_mask
from .ms_deform_attn_fused import _frame, _softmax, _through_softmax


@triton.jit
def _dots(
    grad_output, value_ptr, offset, channel, counts, left, top, right, lower, height, width, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BILINEAR: tl.constexpr,
):  # fmt: skip
    """Dot products of grad_output with the sample and with its slopes along x and y, over a block of channels."""
    sample = tl.zeros_like(right)
    x = tl.zeros_like(right)
    y = tl.zeros_like(right)
    for corner in tl.static_range(4 if BILINEAR else 1):
        inside, coefficient, x_slope, y_slope = _corner(
            corner, counts, left, top, right, lower, height, width
        )
        shift = (corner % 2 + corner // 2 * width.to(offset.dtype)) * stride
        value = _channels(value_ptr, offset + shift, inside, channel, D, BLOCK_D).to(grad_output.dtype)
        # A NaN of grad_output times the zero of a corner outside would be NaN.
        dot = tl.where(inside, tl.sum(value * grad_output, axis=1), 0.0)
        sample += coefficient * dot
        if BILINEAR:
            x += x_slope * dot
            y += y_slope * dot
    return sample, x, y


@triton.jit
def _scatter(
    tile, ptr, offset, channel, counts, left, top, right, lower, height, width, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BILINEAR: tl.constexpr,
):  # fmt: skip
    """Adds the corners' shares of a tile to their pixels, which may repeat."""
    for corner in tl.static_range(4 if BILINEAR else 1):
        inside, coefficient, _, _ = _corner(corner, counts, left, top, right, lower, height, width)
        shift = (corner % 2 + corner // 2 * width.to(offset.dtype)) * stride
        target = ptr + channel[None, :] + (offset + shift)[:, None]
        tl.atomic_add(
            target, coefficient[:, None] * tile, mask=_tile_mask(inside, channel, D, BLOCK_D), sem="relaxed"
        )


@triton.jit
def _put(tile, i, numbers):
    """Adds a number to column i of each row of a tile."""
    return tile + tl.where(tl.arange(0, tile.shape[1])[None, :] == i, numbers[:, None], 0.0)


@triton.jit
def _put_pairs(tile, i, counts, x, y):
    """Adds a pair to the i-th pair of columns if the point counts."""
    tile = _put(tile, 2 * i, tl.where(counts, x, 0.0))
    return _put(tile, 2 * i + 1, tl.where(counts, y, 0.0))


@triton.jit
def _store(ptr, first, tile, m_row, COUNT: tl.constexpr):
    """Stores the first COUNT numbers of each row of a tile side by side; no-op if `ptr` is None."""
    if ptr is not None:
        i = tl.arange(0, tile.shape[1])[None, :]
        mask = m_row[:, None] & (i < COUNT)
        tl.store(ptr + first[:, None] + i, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def ms_deform_attn_backward(
    grad_value_ptr,  # [B, S, M, D] of ACC, added to; gradients that are not needed are None
    grad_locations_ptr,  # [B, Q, M, K, 2]
    grad_weights_ptr,  # [B, Q, M, K]
    grad_places_ptr,  # [B, Q, M, K, 2] of ACC, fused form only: of the computed locations, eq. (7)
    grad_output_ptr,  # [B, Q, M, D]; the rest as in forward
    value_ptr, shapes_ptr, level_start_ptr, level_of_group_ptr, locations_ptr, weights_ptr,
    reference_ptr, reference_image, reference_query, reference_level, S, M, Q, D: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_POINTS: tl.constexpr, NUMBERS: tl.constexpr, BILINEAR: tl.constexpr,
    ACC: tl.constexpr, OFFSET: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Eqs. (5), (6) and (7); in the fused form (11) and (12)."""
    image, head, query, row = _queries(M, Q, BLOCK_Q)
    m_q = query < Q
    channel = tl.arange(0, BLOCK_D)
    K: tl.constexpr = GROUPS * GROUP_POINTS
    grad_output = _channels(grad_output_ptr, row * D, m_q, channel, D, BLOCK_D).to(ACC)
    if NUMBERS > 0:
        largest, inverse = _softmax(weights_ptr, row, m_q, K, False, ACC)
        weights = tl.zeros([BLOCK_Q, BLOCK_K], dtype=ACC)
    for group in range(GROUPS):
        level = _level_of(group, level_of_group_ptr)
        height, width, start = _level(level, shapes_ptr, level_start_ptr)
        origin = ((image * S + start) * M + head) * D
        x_shift, y_shift, x_scale, y_scale = _frame(
            reference_ptr, reference_image, reference_query, reference_level, image, query, m_q, level,
            level_of_group_ptr, height, width, GROUPS, GROUP_POINTS, NUMBERS, ACC,
        )  # fmt: skip
        run = row * K + group * GROUP_POINTS
        # The gradients of a group are stored together: one by one, each would cross shared memory, with two barriers.
        if NUMBERS == 0:
            weights = tl.zeros([BLOCK_Q, BLOCK_P], dtype=ACC)
        locations = tl.zeros([BLOCK_Q, 2 * BLOCK_P], dtype=ACC)
        places = tl.zeros([BLOCK_Q, 2 * BLOCK_P], dtype=ACC)
        for step in range(GROUP_POINTS):
            weight = tl.load(weights_ptr + run + step, mask=m_q, other=0.0).to(ACC)
            if NUMBERS > 0:
                weight = tl.exp(weight - largest) * inverse
            counts, left, top, right, lower = _locate(
                locations_ptr, run + step, m_q, height, width, x_shift, y_shift, x_scale, y_scale,
                NUMBERS, BILINEAR, ACC,
            )  # fmt: skip
            offset = (top.to(OFFSET) * width + left) * (M * D)
            for first in range(0, D, BLOCK_D):
                if D > BLOCK_D:
                    channel = first + tl.arange(0, BLOCK_D)
                    grad_output = _channels(grad_output_ptr, row * D, m_q, channel, D, BLOCK_D).to(ACC)
                if (
                    grad_locations_ptr is not None
                    or grad_weights_ptr is not None
                    or grad_places_ptr is not None
                ):
                    sample, x, y = _dots(
                        grad_output, value_ptr + origin, offset, channel, counts, left, top, right, lower, height,
                        width, M * D, D, BLOCK_D, BILINEAR,
                    )  # fmt: skip
                    weights = _put(weights, step if NUMBERS == 0 else group * GROUP_POINTS + step, sample)
                    if BILINEAR:  # a slope of 0 times a weight that is not finite would be NaN
                        x, y = x * weight, y * weight
                        locations = _put_pairs(locations, step, counts, x * x_scale, y * y_scale)
                        places = _put_pairs(places, step, counts, x * width, y * height)
                if grad_value_ptr is not None:
                    _scatter(
                        weight[:, None] * grad_output, grad_value_ptr + origin, offset, channel, counts, left, top,
                        right, lower, height, width, M * D, D, BLOCK_D, BILINEAR,
                    )  # fmt: skip
        if NUMBERS == 0:
            _store(grad_weights_ptr, run, weights, m_q, GROUP_POINTS)
        _store(grad_locations_ptr, 2 * run, locations, m_q, 2 * GROUP_POINTS)
        _store(grad_places_ptr, 2 * run, places, m_q, 2 * GROUP_POINTS)
    if NUMBERS > 0:
        logits = _through_softmax(weights, weights_ptr, row, m_q, largest, inverse, K, BLOCK_K, ACC)
        _store(grad_weights_ptr, row * K, logits, m_q, K)
