# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the kernels made of matrix products: masked tiles, products, and sums of products over all rows.

Products run on tensor cores if the type has them: factors are of type DOT, that of the tensors, and sums are float.
PRECISION decides about float factors: "ieee" multiplies in full precision, without tensor cores; "tf32" multiplies as
torch under ``torch.backends.cuda.matmul.allow_tf32``. The interpreter's bfloat16 products are wrong: its DOT is float.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_mask(m_row, column, WIDTH: tl.constexpr):
    """Mask of a tile of rows and columns, or of rows only if all blocks of columns are full."""
    mask = m_row[:, None]
    if WIDTH // column.shape[0] * column.shape[0] != WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return mask


@triton.jit
def read_tile(ptr, row, m_row, column, WIDTH: tl.constexpr):
    """A tile of a matrix [., WIDTH]; zeros outside."""
    return tl.load(
        ptr + (row * WIDTH)[:, None] + column[None, :], mask=tile_mask(m_row, column, WIDTH), other=0.0
    )


@triton.jit
def write_tile(ptr, row, m_row, column, tile, WIDTH: tl.constexpr):
    target = ptr + (row * WIDTH)[:, None] + column[None, :]
    tl.store(target, tile.to(ptr.dtype.element_ty), mask=tile_mask(m_row, column, WIDTH))


@triton.jit
def read_row(ptr, column, WIDTH: tl.constexpr):
    """Elements of a vector [WIDTH] as floats; zeros outside."""
    return tl.load(ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def product(left, right, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """left [M, K] times right [K, N]."""
    return tl.dot(left.to(DOT), right.to(DOT), input_precision=PRECISION)


@triton.jit
def part_of(part, parts, length, BLOCK: tl.constexpr):
    """The item that a part belongs to, and the part's begin and end. Parts are whole blocks, the last one cut off."""
    blocks = tl.cdiv(tl.cdiv(length, BLOCK), parts)
    first = (part % parts).to(tl.int32) * blocks * BLOCK
    return part // parts, first, tl.minimum(first + blocks * BLOCK, length)


def products_table(p: int, q: int, item_bytes: int) -> dict[str, int]:
    """Block sizes of `row_products` for products [p, q]: one side has few tokens or hidden units, one many channels.

    Chosen by static figures (registers, shared memory), not measured on a card.
    """
    block_p, block_q = (min(max(triton.next_power_of_2(width), 16), 64) for width in (p, q))
    return {
        "BLOCK_N": 64 if item_bytes == 2 else 32,
        "BLOCK_P": block_p,
        "BLOCK_Q": block_q,
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit
def row_products(
    products_ptr,  # [B, PARTS, P, Q] float, for each part of the rows; None if not needed
    sums_ptr,  # [B, PARTS, P] float, sums of the rows of left; None if not needed
    left_ptr,  # [B, N, P]
    right_ptr,  # [B, N, Q]; None and Q = 1 if there are no products
    scale_ptr,  # [1] float or None; all results are multiplied by factor and this
    factor,
    N,
    PARTS,
    P: tl.constexpr,
    Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program owns a tile of leftᵀ right and sums it over one part of the rows of one item of the batch.

    Tiles of the same rows run side by side and share them in L2.
    """
    tiles_q: tl.constexpr = (Q + BLOCK_Q - 1) // BLOCK_Q
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * tiles_q
    part = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    item, begin, end = part_of(part, PARTS, N, BLOCK_N)
    p = tile // tiles_q * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tile % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.float32)
    sums = tl.zeros([BLOCK_P], dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        left = read_tile(left_ptr, item * N + n, n < N, p, P)
        if products_ptr is not None:
            right = read_tile(right_ptr, item * N + n, n < N, q, Q)
            total += product(tl.trans(left), right, DOT, PRECISION)
        if sums_ptr is not None:
            sums += tl.sum(left.to(tl.float32), axis=0)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    if products_ptr is not None:
        write_tile(products_ptr, part * P + p, p < P, q, total * factor, Q)
    if sums_ptr is not None:  # noqa: SIM102 - decided at compile time, the next one is not
        if tile % tiles_q == 0:
            tl.store(sums_ptr + part * P + p, sums * factor, mask=p < P)
