# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the Triton kernels made of matrix products share: types of factors, splits, sums over rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkern.ops.triton_launch import _cdiv, _on

# Programs to split sums over rows or pixels into: some rounds for any card. A constant, so that results do not depend
# on the card's size.
_PROGRAMS = 512
# Rows below which a split costs more than it gains: its partial sums are written and read once.
_LEAST_ROWS = 256


def product_constants(tensor: Tensor) -> dict[str, Any]:
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
    """Into how many parts to split the rows, given that `others` programs work on each part."""
    most = max(1, _PROGRAMS // max(others, 1))
    parts = min(most, _cdiv(rows, max(_LEAST_ROWS, block)))
    blocks = _cdiv(_cdiv(rows, block), max(parts, 1))  # of one part; the last part may have fewer, but not none
    return max(1, _cdiv(_cdiv(rows, block), max(blocks, 1)))


def sum_of_products(
    left: Tensor,  # [B, N, P]
    right: Tensor,  # [B, N, Q]
    *,
    scale: Tensor | None = None,
    factor: float = 1.0,
    products: bool = True,
    sums: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """factor * scale times leftᵀ right, [B, P, Q], and the sums of left over its rows, [B, P]; each only if wanted."""
    from vitkern.triton_kernels import tiles as kernels

    batch, rows, p = left.shape
    q = right.shape[2]
    blocks = kernels.products_table(p, q, left.element_size())
    tiles_p, tiles_q = _cdiv(p, blocks["BLOCK_P"]), _cdiv(q, blocks["BLOCK_Q"]) if products else 1
    parts = parts_of(rows, blocks["BLOCK_N"], batch * tiles_p * tiles_q)
    floats = {"dtype": torch.float32, "device": left.device}
    part_products = torch.empty((batch, parts, p, q), **floats) if products else None
    part_sums = torch.empty((batch, parts, p), **floats) if sums else None
    with _on(left):
        kernels.row_products[(batch * parts, tiles_p, tiles_q)](
            part_products,
            part_sums,
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
    return _sum_of_parts(part_products), _sum_of_parts(part_sums)


def _sum_of_parts(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts.sum(1)
