# SPDX-License-Identifier: Apache-2.0
"""Gradients of the adapter bottleneck, eqs. (6) to (11) of docs/derivations/adapter_bottleneck.md.

Shapes, names and work split are those of adapter_bottleneck.py: one program computes BLOCK_N rows from z and e to the
gradient of x. Sums over all rows are written as one partial sum a program; the caller adds them in a fixed order. For
the weights' gradients, (9) and (10), the kernel writes the hidden units' a and f, and `tiles.row_products` multiplies
them with grad_output and x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .adapter_bottleneck import _activation, _down, _dropout
from .tiles import product, read_row, read_tile, write_tile


@triton.jit
def _through_activation(z, gradient, ACTIVATION: tl.constexpr):
    """The gradient of z from the gradient of the activation."""
    if ACTIVATION == "relu":
        gradient = tl.where(z <= 0, 0.0, gradient)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        gradient *= share + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        share = 1 / (1 + tl.exp(-z))
        gradient *= share * (1 + z * (1 - share))
    return gradient


@triton.jit
def _up_transposed(
    grad_output_ptr, weight_ptr, bias_ptr, row, m_row, hidden, C: tl.constexpr, H: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. (6): e of a block of rows, and for the last term of (11) their dot products with b_u, if there is one."""
    e = tl.zeros([row.shape[0], hidden.shape[0]], dtype=tl.float32)
    along_bias = tl.zeros([row.shape[0]], dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        grad_output = read_tile(grad_output_ptr, row, m_row, channel, C)
        weight = read_tile(weight_ptr, channel, channel < C, hidden, H)
        e += product(grad_output, weight, DOT, PRECISION)
        if bias_ptr is not None:
            along_bias += tl.sum(grad_output.to(tl.float32) * read_row(bias_ptr, channel, C)[None, :], axis=1)
    return e, along_bias


@triton.jit
def adapter_bottleneck_backward(
    grad_x_ptr,  # [N, C]; None if not needed, as all outputs
    a_ptr,  # [N, H]
    f_ptr,  # [N, H]
    grad_down_bias_ptr,  # [programs, H] float
    grad_scale_ptr,  # [programs] float
    grad_output_ptr,  # [N, C]
    kept_ptr,  # [N, H] float, z; None: computed again
    x_ptr, down_weight_ptr, down_bias_ptr, up_weight_ptr,
    up_bias_ptr,  # [C]; None unless the gradient of the scale needs it
    scale_ptr, seed_ptr, factor, threshold, rescale, N, C: tl.constexpr, H: tl.constexpr,
    RESIDUAL_IS_X: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = row < N
    hidden = tl.arange(0, BLOCK_H)
    m_hidden = m_row[:, None] & (hidden < H)[None, :]
    if kept_ptr is not None:
        z = read_tile(kept_ptr, row, m_row, hidden, H)
    else:
        z = _down(x_ptr, down_weight_ptr, down_bias_ptr, row, m_row, hidden, C, H, DOT, PRECISION, BLOCK_C)
    a = _activation(z, ACTIVATION)
    if seed_ptr is not None:
        dropout = _dropout(seed_ptr, row, hidden, threshold, rescale, H)
        a *= dropout
    if a_ptr is not None:
        write_tile(a_ptr, row, m_row, hidden, a, H)
    e, along_bias = _up_transposed(
        grad_output_ptr, up_weight_ptr, up_bias_ptr, row, m_row, hidden, C, H, DOT, PRECISION, BLOCK_C
    )
    # Padding units and rows may be NaN if x or a weight is infinite.
    if grad_scale_ptr is not None:
        dots = tl.sum(tl.where(m_hidden, a * e, 0.0), axis=1) + along_bias
        tl.store(grad_scale_ptr + tl.program_id(0), factor * tl.sum(dots, axis=0))
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    f = factor * e
    if seed_ptr is not None:
        f *= dropout
    f = tl.where(m_hidden, _through_activation(z, f, ACTIVATION), 0.0)
    if grad_down_bias_ptr is not None:
        sums = tl.sum(f, axis=0)
        tl.store(grad_down_bias_ptr + tl.program_id(0).to(tl.int64) * H + hidden, sums, mask=hidden < H)
    if f_ptr is not None:
        write_tile(f_ptr, row, m_row, hidden, f, H)
    if grad_x_ptr is not None:
        f = f.to(DOT)
        for first in range(0, C, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            weight = read_tile(down_weight_ptr, hidden, hidden < H, channel, C)
            grad_x = product(f, weight, DOT, PRECISION)
            if RESIDUAL_IS_X:
                grad_x += read_tile(grad_output_ptr, row, m_row, channel, C).to(tl.float32)
            write_tile(grad_x_ptr, row, m_row, channel, grad_x, C)
