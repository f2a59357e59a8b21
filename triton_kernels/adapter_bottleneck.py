# SPDX-License-Identifier: Apache-2.0
"""The adapter bottleneck, eqs. (1) to (5) of docs/derivations/adapter_bottleneck.md.

Shapes: N rows, C channels, H hidden units. s of eq. (3) is `factor` times the number at `scale_ptr`.

Work split: one program computes BLOCK_N rows. It loops over tiles of channels for z, keeps the BLOCK_H hidden units of
its rows on the chip, and loops over the channels again for y.
Memory: x is read once (again from L2 if it is the residual), y is written once; the weights come from L2.
Offsets of rows are int64.
Numerics: sums, bias, activation, scale and residual are float; the factors of products have the type of x. NaN passes
relu and dropout as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import product, read_row, read_tile, write_tile

MAX_HIDDEN = 512  # more do not fit the registers of one program
_FEW_ROWS = 8192  # with fewer rows, blocks of 64 leave most of a large card idle


def launch_table(rows: int, hidden: int, item_bytes: int, backward: bool = False) -> dict[str, int]:
    """Block sizes that hold a tile of hidden units in 32 to 64 registers a thread.

    Chosen by static figures (registers, spills, shared memory), not measured on a card.
    """
    block_h = max(triton.next_power_of_2(hidden), 16)
    block_n = max(16, min(32 if rows < _FEW_ROWS or item_bytes == 4 else 64, 8192 // block_h))
    return {
        "BLOCK_N": block_n,
        "BLOCK_H": block_h,
        "BLOCK_C": (64 if item_bytes == 2 else 32) // (1 if block_h <= 128 else 2),
        "num_warps": 4 if block_n * block_h <= (2048 if backward else 4096) else 8,
        "num_stages": 3 if block_h <= 128 else 2,
    }


@triton.jit
def _down(
    x_ptr, weight_ptr, bias_ptr, row, m_row, hidden, C: tl.constexpr, H: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Eq. (1): z of a block of rows."""
    z = tl.zeros([row.shape[0], hidden.shape[0]], dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        x = read_tile(x_ptr, row, m_row, channel, C)
        weight = read_tile(weight_ptr, hidden, hidden < H, channel, C)
        z += product(x, tl.trans(weight), DOT, PRECISION)
    if bias_ptr is not None:
        z += read_row(bias_ptr, hidden, H)[None, :]
    return z


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        value = tl.where(z <= 0, 0.0, z)  # NaN passes
    elif ACTIVATION == "gelu":
        value = z * (0.5 * (1 + tl.erf(z * 0.7071067811865476)))
    else:
        value = z / (1 + tl.exp(-z))
    return value


@triton.jit
def _words(seed_ptr, counter):
    """Eq. (4): the four random words of each counter."""
    low = counter.to(tl.uint32)
    zero = low * 0
    return tl.philox(tl.load(seed_ptr), low, (counter >> 32).to(tl.uint32), zero, zero)


@triton.jit
def _dropout(seed_ptr, row, hidden, threshold, rescale, H: tl.constexpr):
    """Eq. (5): the dropout factors of the hidden units of a block of rows."""
    limit = tl.cast(threshold, tl.uint32)
    if H % 4 == 0:
        # Four units of a row share a counter.
        group = tl.arange(0, hidden.shape[0] // 4)
        w0, w1, w2, w3 = _words(seed_ptr, (row * (H // 4))[:, None] + group[None, :])
        even = tl.interleave(tl.where(w0 < limit, 0.0, rescale), tl.where(w2 < limit, 0.0, rescale))
        odd = tl.interleave(tl.where(w1 < limit, 0.0, rescale), tl.where(w3 < limit, 0.0, rescale))
        factor = tl.interleave(even, odd)
    else:
        unit = (row * H)[:, None] + hidden[None, :]
        w0, w1, w2, w3 = _words(seed_ptr, unit >> 2)
        word = unit & 3
        word = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        factor = tl.where(word < limit, 0.0, rescale)
    return factor


@triton.jit
def adapter_bottleneck_forward(
    output_ptr,  # [N, C]
    kept_ptr,  # [N, H] float, z for backward; None if not kept
    x_ptr,  # [N, C]
    down_weight_ptr,  # [H, C]
    down_bias_ptr,  # [H] or None
    up_weight_ptr,  # [C, H]
    up_bias_ptr,  # [C] or None
    residual_ptr,  # [N, C] or None
    scale_ptr,  # [1] float or None
    seed_ptr,  # [1] int64; None: no dropout
    factor,
    threshold,
    rescale,
    N,
    C: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = row < N
    hidden = tl.arange(0, BLOCK_H)
    z = _down(x_ptr, down_weight_ptr, down_bias_ptr, row, m_row, hidden, C, H, DOT, PRECISION, BLOCK_C)
    if kept_ptr is not None:
        write_tile(kept_ptr, row, m_row, hidden, z, H)
    a = _activation(z, ACTIVATION)
    if seed_ptr is not None:
        a *= _dropout(seed_ptr, row, hidden, threshold, rescale, H)
    if H != BLOCK_H:  # x may be infinite, and z of a padding unit is then NaN
        a = tl.where((hidden < H)[None, :], a, 0.0)
    a = a.to(DOT)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        weight = read_tile(up_weight_ptr, channel, channel < C, hidden, H)
        y = product(a, tl.trans(weight), DOT, PRECISION)
        if up_bias_ptr is not None:
            y += read_row(up_bias_ptr, channel, C)[None, :]
        y *= factor
        if residual_ptr is not None:
            y += read_tile(residual_ptr, row, m_row, channel, C).to(tl.float32)
        write_tile(output_ptr, row, m_row, channel, y, C)
