# SPDX-License-Identifier: Apache-2.0
"""The code that launchers of matrix products share: types of factors, parts, sums over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitkern.ops.triton_common import cdiv, on

# Programs to split sums over rows or pixels into: some rounds for any card. A constant, so that results do not depend
# on the card's size.
_PROGRAMS = 512
# Rows below which more parts cost more than they gain: their partial sums are written and read once.
_LEAST_ROWS = 256


def product_constants(tensor: Tensor) -> dict[str, object]:
    """Types of the factors of products, see triton_kernels/tiles.py."""
    import triton.language as tl

    interpreted = tensor.device.type == "cpu"
    factors = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "DOT": tl.float32 if interpreted else factors[tensor.dtype],
        "PRECISION": "tf32" if tf32 and not interpreted else "ieee",
    }


def parts_of(rows: int, block: int, others: int) -> int:
    """The number of parts for the rows, if `others` programs work on each part."""
    most = max(1, _PROGRAMS // max(others, 1))
    parts = min(most, cdiv(rows, max(_LEAST_ROWS, block)))
    blocks = cdiv(cdiv(rows, block), max(parts, 1))  # of one part; the last part may have fewer, but not none
    return max(1, cdiv(cdiv(rows, block), max(blocks, 1)))


def sum_of_products(
    left: Tensor,  # [..., N, P]
    right: Tensor | None,  # [..., N, Q]
    *,
    scale: Tensor | None = None,
    factor: float = 1.0,
    sums: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """factor * scale times leftᵀ right, [..., P, Q], if right is given, and times the sums of left over N, [..., P]."""
    from vitkern.triton_kernels import tiles as kernels

    *items, rows, p = left.shape
    q = 1 if right is None else right.shape[-1]
    batch = math.prod(items)
    blocks = kernels.products_table(p, q, left.element_size())
    tiles = cdiv(p, blocks["BLOCK_P"]) * cdiv(q, blocks["BLOCK_Q"])
    parts = parts_of(rows, blocks["BLOCK_N"], batch * tiles)
    products = None if right is None else left.new_empty((*items, parts, p, q), dtype=torch.float32)
    totals = left.new_empty((*items, parts, p), dtype=torch.float32) if sums else None
    with on(left):
        kernels.row_products[(batch * parts * tiles,)](
            products,
            totals,
            left,
            right,
            scale,
            factor,
            rows,
            parts,
            p,
            q,
            **product_constants(left),
            **blocks,
        )
    return (
        None if products is None else products.sum(-3),
        None if totals is None else totals.sum(-2),
    )
