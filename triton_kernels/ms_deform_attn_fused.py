# SPDX-License-Identifier: Apache-2.0
"""The fused form of multi-scale deformable attention: softmax, eqs. (8) and (11), and locations, eqs. (9), (10), (12).

The kernels read logits z and offsets d in place of weights and locations. They keep two numbers for a row of K logits:
the largest and 1 / total, with total the sum of exp(z - largest). Each weight is computed where it is used: weights and
locations are never in memory. A location in pixels is shift + scale * d, see ``_frame``. NUMBERS is the size of a
reference point, 2 or 4, and 0 in the plain form.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(logits_ptr, row, m_row, K: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Rows of logits, padded with numbers of weight zero."""
    point = tl.arange(0, BLOCK_K)[None, :]
    mask = m_row[:, None] & (point < K)
    logits = tl.load(logits_ptr + (row * K)[:, None] + point, mask=mask, other=0.0).to(ACC)
    return tl.where(point < K, logits, float("-inf"))


@triton.jit
def _logit(logits_ptr, row, m_row, point, K: tl.constexpr, ACC: tl.constexpr):
    """One logit of each row."""
    return tl.load(logits_ptr + row * K + point, mask=m_row, other=0.0).to(ACC)


@triton.jit
def _softmax(logits_ptr, row, m_row, K: tl.constexpr, UNROLLED: tl.constexpr, ACC: tl.constexpr):
    """Eq. (8): the largest logit of each row, and 1 / total. NaN and infinities enter through the total.

    The loops read single logits: a tile of logits would have a layout of its own, and every point would be located
    twice, once for the threads that weigh it and once for the threads that sample it. A rolled loop before forward's
    sampling loop has the same effect, so forward sets UNROLLED; in backward, unrolled loops would cost registers.
    """
    largest = tl.full([row.shape[0]], float("-inf"), dtype=ACC)
    total = tl.zeros([row.shape[0]], dtype=ACC)
    if UNROLLED:
        for point in tl.static_range(K):
            largest = tl.maximum(largest, _logit(logits_ptr, row, m_row, point, K, ACC))
        for point in tl.static_range(K):
            total += tl.exp(_logit(logits_ptr, row, m_row, point, K, ACC) - largest)
    else:
        for point in range(K):
            largest = tl.maximum(largest, _logit(logits_ptr, row, m_row, point, K, ACC))
        for point in range(K):
            total += tl.exp(_logit(logits_ptr, row, m_row, point, K, ACC) - largest)
    return largest, 1 / total


@triton.jit
def _through_softmax(
    grad_weights, logits_ptr, row, m_row, largest, inverse,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Eq. (11): the gradients of a row's logits from those of all its weights."""
    logits = _logits(logits_ptr, row, m_row, K, BLOCK_K, ACC)
    weights = tl.exp(logits - largest[:, None]) * inverse[:, None]
    return weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None])


@triton.jit
def _frame(
    reference_ptr, image_stride, query_stride, level_stride, image, query, m_query, level, level_of_group_ptr,
    height, width, GROUPS: tl.constexpr, GROUP_POINTS: tl.constexpr, NUMBERS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Shifts and scales, along x and y, from the numbers in locations to pixels: eqs. (2), (9) and (10).

    In every form, the derivative of a pixel coordinate by these numbers is the scale.
    """
    x_shift, y_shift, x_scale, y_scale = 0.0, 0.0, width, height
    if NUMBERS > 0:
        reference = reference_ptr + image * image_stride + query * query_stride + level * level_stride
        x_shift = tl.load(reference, mask=m_query, other=0.0).to(ACC) * width
        y_shift = tl.load(reference + 1, mask=m_query, other=0.0).to(ACC) * height
        x_scale, y_scale = 1.0, 1.0
    if NUMBERS == 4:
        points = GROUP_POINTS
        if level_of_group_ptr is not None:
            points = tl.load(level_of_group_ptr + GROUPS + level)
        x_scale = tl.load(reference + 2, mask=m_query, other=0.0).to(ACC) * width / (2 * points)
        y_scale = tl.load(reference + 3, mask=m_query, other=0.0).to(ACC) * height / (2 * points)
    return x_shift, y_shift, x_scale, y_scale
