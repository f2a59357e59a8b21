# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of token_pool: allocation and launches, on contiguous tensors of one dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkern.ops.plan import Gradients, Needed, Plan, plan_of
from vitkern.ops.token_pool import Inputs
from vitkern.ops.triton_common import cdiv, on
from vitkern.ops.triton_products import parts_of, product_constants


def plan(inputs: Inputs) -> Plan:
    return plan_of(inputs, 2, _forward, _backward)


def _blocks(x: Tensor, weight: Tensor, backward: bool = False) -> dict[str, int]:
    from vitkern.triton_kernels import token_pool as kernels

    return kernels.launch_table(x.shape[2], weight.shape[-2], x.element_size(), backward)


def _weight_stride(weight: Tensor) -> int:
    """The distance from the weight of one image to that of the next."""
    return weight[0].numel() if weight.dim() == 3 and len(weight) else 0


def _parts(x: Tensor, blocks: dict[str, int]) -> tuple[int, int]:
    """Parts of the pixels of an image, and tiles of channels."""
    batch, pixels, channels = x.shape
    tiles = cdiv(channels, blocks["BLOCK_C"])
    return parts_of(pixels, blocks["BLOCK_N"], batch * tiles), tiles


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, C], and the largest logit and the total of each, [B, 2, T]."""
    from vitkern.triton_kernels import token_pool as kernels

    x, weight, _ = inputs
    (batch, pixels, channels), tokens = x.shape, weight.shape[-2]
    output = x.new_empty((batch, tokens, channels))
    statistics = x.new_empty((batch, 2, tokens), dtype=torch.float32)
    if x.numel() == 0 or tokens == 0:
        return output.zero_(), statistics.zero_()

    blocks = _blocks(x, weight)
    parts, tiles = _parts(x, blocks)
    largest = x.new_empty((batch, parts, tokens), dtype=torch.float32)
    total = x.new_empty((batch, parts, tokens), dtype=torch.float32)
    pooled = x.new_empty((batch, parts, tokens, channels), dtype=torch.float32)
    with on(x):
        kernels.token_pool_forward[(batch * parts * tiles,)](
            largest,
            total,
            pooled,
            x,
            weight,
            _weight_stride(weight),
            pixels,
            parts,
            tokens,
            channels,
            **product_constants(x),
            **blocks,
        )
        merged = kernels.merge_table(channels)
        kernels.token_pool_merge[(batch * tokens, cdiv(channels, merged["BLOCK_C"]))](
            output,
            statistics,
            largest,
            total,
            pooled,
            parts,
            tokens,
            channels,
            **merged,
        )
    return output, statistics


def _backward(
    needed: Needed, grad_output: Tensor, inputs: Inputs, tokens: Tensor, statistics: Tensor
) -> Gradients:
    """Gradients of x and, in float32, of the weight."""
    from vitkern.triton_kernels import token_pool as kernels

    x, weight, _ = inputs
    batch, pixels, channels = x.shape
    need_x, need_weight = needed
    if x.numel() == 0 or tokens.numel() == 0:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        return [torch.zeros_like(x) if need_x else None, grad_weight]

    blocks = _blocks(x, weight, backward=True)
    parts, tiles = _parts(x, blocks)
    grad_x = torch.empty_like(x) if need_x else None
    grad_weight = None
    if need_weight:
        shape = (batch, parts, weight.shape[-2], channels)
        grad_weight = x.new_empty(shape, dtype=torch.float32)
    with on(x):
        kernels.token_pool_backward[(batch * parts * tiles,)](
            grad_x,
            grad_weight,
            grad_output,
            tokens,
            statistics,
            x,
            weight,
            _weight_stride(weight),
            pixels,
            parts,
            weight.shape[-2],
            channels,
            **product_constants(x),
            **blocks,
        )
    if grad_weight is not None:
        grad_weight = grad_weight.sum(1 if weight.dim() == 3 else (0, 1))
    return [grad_x, grad_weight]
