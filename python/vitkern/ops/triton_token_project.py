# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of token_project: allocation and launches, on contiguous tensors of one dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkern.ops.plan import Gradients, Needed, Plan, plan_of
from vitkern.ops.token_project import Inputs
from vitkern.ops.triton_common import cdiv, on
from vitkern.ops.triton_products import product_constants, sum_of_products


def plan(inputs: Inputs) -> Plan:
    return plan_of(inputs, 4, _forward, _backward)


def _arguments(query: Tensor, key: Tensor, tokens: Tensor) -> tuple[int, dict[str, object]]:
    """The number of programs, and the constants that they are specialised on."""
    from vitkern.triton_kernels import token_project as kernels

    (batch, pixels, keys), (_, count, channels) = query.shape, tokens.shape
    blocks = kernels.launch_table(count, query.element_size())
    sizes = {"N": pixels, "C": channels, "T": count, "K": keys}
    return batch * cdiv(pixels, blocks["BLOCK_N"]), sizes | product_constants(query) | blocks


def _forward(inputs: Inputs) -> Tensor:
    from vitkern.triton_kernels import token_project as kernels

    x, query, key, tokens, _ = inputs
    if x.numel() == 0 or key.shape[1] == 0:
        return x.clone()
    programs, constants = _arguments(query, key, tokens)
    output = torch.empty_like(x)
    with on(x):
        kernels.token_project_forward[(programs,)](output, x, query, key, tokens, **constants)
    return output


def _backward(needed: Needed, grad_output: Tensor, inputs: Inputs) -> Gradients:
    """Gradients of query and, in float32, of key and tokens; that of x is grad_output."""
    from vitkern.triton_kernels import token_project as kernels

    _, query, key, tokens, _ = inputs
    need_query, need_key, need_tokens = needed
    if query.shape[:2].numel() == 0 or key.shape[1] == 0:
        zeros = [torch.zeros_like(query)]
        zeros += [torch.zeros_like(t, dtype=torch.float32) for t in (key, tokens)]
        return [zero if need else None for zero, need in zip(zeros, needed)]

    programs, constants = _arguments(query, key, tokens)
    shape = (*query.shape[:2], key.shape[1])
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
