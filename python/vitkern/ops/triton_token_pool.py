# SPDX-License-Identifier: Apache-2.0
"""Allocates for the Triton kernels of token pooling and launches them. Callers have checked everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkern.ops.token_pool import TokenPoolCall
from vitkern.ops.triton_common import cdiv, on
from vitkern.ops.triton_products import parts_of, product_constants


def _blocks(call: TokenPoolCall, backward: bool = False) -> dict[str, Any]:
    from vitkern.triton_kernels import token_pool as kernels

    channels, tokens = call.x.shape[2], call.weight.shape[-2]
    if tokens > kernels.MAX_TOKENS:
        raise ValueError(
            f"token_pool: weight must have at most {kernels.MAX_TOKENS} tokens for backend 'triton', got {tokens}"
        )
    return kernels.launch_table(channels, tokens, call.x.element_size(), backward)


def _weight_stride(call: TokenPoolCall) -> int:
    """From the weight of one image to that of the next."""
    return call.weight[0].numel() if call.weight.dim() == 3 and len(call.weight) else 0


def _parts(call: TokenPoolCall, blocks: dict[str, Any]) -> tuple[int, int]:
    """Parts that the pixels of an image are split into, and tiles of channels."""
    batch, pixels, channels = call.x.shape
    tiles = cdiv(channels, blocks["BLOCK_C"])
    return parts_of(pixels, blocks["BLOCK_N"], batch * tiles), tiles


def token_pool_forward_triton(call: TokenPoolCall) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, C], and of each one [B, 2, T] the greatest logit and the sum of exponentials."""
    from vitkern.triton_kernels import token_pool as kernels

    x, (batch, pixels, channels), tokens = call.x, call.x.shape, call.weight.shape[-2]
    blocks = _blocks(call)
    output = x.new_empty((batch, tokens, channels))
    statistics = x.new_empty((batch, 2, tokens), dtype=torch.float32)
    if call.x.numel() == 0 or tokens == 0:
        return output.zero_(), statistics.zero_()

    parts, tiles = _parts(call, blocks)
    largest = x.new_empty((batch, parts, tokens), dtype=torch.float32)
    total = x.new_empty((batch, parts, tokens), dtype=torch.float32)
    pooled = x.new_empty((batch, parts, tokens, channels), dtype=torch.float32)
    with on(x):
        kernels.token_pool_forward[(batch * parts * tiles,)](
            largest,
            total,
            pooled,
            x,
            call.weight,
            _weight_stride(call),
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


def token_pool_backward_triton(
    call: TokenPoolCall, grad_output: Tensor, tokens: Tensor, statistics: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of x and, float, of the weight."""
    from vitkern.triton_kernels import token_pool as kernels

    x, weight, (batch, pixels, channels) = call.x, call.weight, call.x.shape
    need_x, need_weight = needed
    blocks = _blocks(call, backward=True)
    if x.numel() == 0 or tokens.numel() == 0:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        return [torch.zeros_like(x) if need_x else None, grad_weight]

    parts, tiles = _parts(call, blocks)
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
            _weight_stride(call),
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
