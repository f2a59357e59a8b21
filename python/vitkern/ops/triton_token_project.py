# SPDX-License-Identifier: Apache-2.0
"""Allocates for the Triton kernels of token projection and launches them. Callers have checked everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkern.ops.token_project import TokenProjectCall
from vitkern.ops.triton_common import cdiv, on
from vitkern.ops.triton_products import product_constants, sum_of_products


def _arguments(call: TokenProjectCall) -> tuple[int, dict[str, Any]]:
    """How many programs, and what they are specialised on."""
    from vitkern.triton_kernels import token_project as kernels

    batch, pixels, channels = call.x.shape
    _, tokens, keys = call.key.shape
    if tokens > kernels.MAX_TOKENS:
        raise ValueError(
            f"token_project: tokens must be at most {kernels.MAX_TOKENS} for backend 'triton', got {tokens}"
        )
    blocks = kernels.launch_table(tokens, call.x.element_size())
    sizes = {"N": pixels, "C": channels, "T": tokens, "K": keys}
    return batch * cdiv(pixels, blocks["BLOCK_N"]), sizes | product_constants(call.x) | blocks


def token_project_forward_triton(call: TokenProjectCall) -> Tensor:
    from vitkern.triton_kernels import token_project as kernels

    programs, constants = _arguments(call)
    if call.x.numel() == 0 or call.key.shape[1] == 0:
        return call.x.clone()
    output = torch.empty_like(call.x)
    with on(call.x):
        kernels.token_project_forward[(programs,)](
            output, call.x, call.query, call.key, call.tokens, **constants
        )
    return output


def token_project_backward_triton(
    call: TokenProjectCall, grad_output: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of query and, float, of key and tokens; that of x is grad_output."""
    from vitkern.triton_kernels import token_project as kernels

    query, key, tokens = call.query, call.key, call.tokens
    need_query, need_key, need_tokens = needed
    programs, constants = _arguments(call)
    if programs == 0 or key.shape[1] == 0:
        zeros = [torch.zeros_like(query)]
        zeros += [torch.zeros_like(t, dtype=torch.float32) for t in (key, tokens)]
        return [zero if need else None for zero, need in zip(zeros, needed)]

    batch, pixels, _ = query.shape
    shape = (batch, pixels, key.shape[1])
    grad_query = torch.empty_like(query) if need_query else None
    attention = query.new_empty(shape) if need_tokens else None
    f = query.new_empty(shape) if need_key else None
    with on(query):
        kernels.token_project_backward[(programs,)](
            grad_query, attention, f, grad_output, query, key, tokens, **constants
        )
    grad_key = None if f is None else sum_of_products(f, query)[0]
    grad_tokens = None if attention is None else sum_of_products(attention, grad_output)[0]
    return [grad_query, grad_key, grad_tokens]
