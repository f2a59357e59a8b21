# SPDX-License-Identifier: Apache-2.0
"""Allocates for the Triton kernels of the adapter bottleneck and launches them. Callers have checked everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkern import reference
from vitkern.ops.adapter_bottleneck import AdapterBottleneckCall
from vitkern.ops.triton_common import cdiv, on
from vitkern.ops.triton_products import product_constants, sum_of_products


def _blocks(call: AdapterBottleneckCall, backward: bool = False) -> dict[str, int]:
    from vitkern.triton_kernels import adapter_bottleneck as kernels

    hidden = call.down_weight.shape[0]
    if hidden > kernels.MAX_HIDDEN:
        raise ValueError(
            f"adapter_bottleneck: down_weight must have at most {kernels.MAX_HIDDEN} hidden units "
            f"for backend 'triton', got {hidden}"
        )
    return kernels.launch_table(call.x.shape[0], hidden, call.x.element_size(), backward)


def _numbers(call: AdapterBottleneckCall) -> tuple:
    """Factor of the scale, and what dropout compares and multiplies with."""
    p = call.dropout_p
    return call.factor, reference.dropout_threshold(p), reference.dropout_rescale(p), call.x.shape[0]


def _constants(call: AdapterBottleneckCall) -> dict[str, Any]:
    return {
        "C": call.x.shape[1],
        "H": call.down_weight.shape[0],
        "ACTIVATION": call.activation,
        **product_constants(call.x),
    }


def adapter_bottleneck_forward_triton(
    call: AdapterBottleneckCall, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and z for backward if it is to be kept."""
    from vitkern.triton_kernels import adapter_bottleneck as kernels

    rows, hidden, x = call.x.shape[0], call.down_weight.shape[0], call.x
    blocks = _blocks(call)
    output = torch.empty_like(x)
    kept = x.new_empty((rows, hidden), dtype=torch.float32) if keep else None
    if output.numel() == 0:
        return output, kept
    with on(x):
        kernels.adapter_bottleneck_forward[(cdiv(rows, blocks["BLOCK_N"]),)](
            output,
            kept,
            x,
            call.down_weight,
            call.down_bias,
            call.up_weight,
            call.up_bias,
            x if call.residual_is_x else call.residual,
            call.scale,
            call.seed,
            *_numbers(call),
            **_constants(call),
            **blocks,
        )
    return output, kept


def adapter_bottleneck_backward_triton(
    call: AdapterBottleneckCall, grad_output: Tensor, kept: Tensor | None, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of x, both weights and biases, and the scale; those of parameters are float."""
    if call.x.numel() == 0:
        likes = (*call[:5], call.scale)
        return [
            like.new_zeros(like.shape, dtype=torch.float32 if i else None)
            if like is not None and need
            else None
            for i, (like, need) in enumerate(zip(likes, needed))
        ]
    grad_x = grad_down_bias = grad_scale = a = f = None
    _, _, _, need_up, need_up_bias, _ = needed
    if any(needed[:4]) or needed[5]:
        grad_x, grad_down_bias, grad_scale, a, f = _rows(call, grad_output, kept, needed)
    grad_down = grad_up = grad_up_bias = None
    if f is not None:
        grad_down, _ = sum_of_products(f, call.x)
    if need_up or need_up_bias:
        grad_up, grad_up_bias = sum_of_products(
            grad_output, a, scale=call.scale, factor=call.factor, sums=need_up_bias
        )
    return [grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_scale]


def _rows(
    call: AdapterBottleneckCall, grad_output: Tensor, kept: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, b_d and the scale, and what those of the weights are made of: a for W_u, f for W_d."""
    from vitkern.triton_kernels import adapter_bottleneck_backward as kernels

    need_x, need_down, need_down_bias, need_up, _, need_scale = needed
    x, (rows, hidden) = call.x, (call.x.shape[0], call.down_weight.shape[0])
    blocks = _blocks(call, backward=True)
    programs = cdiv(rows, blocks["BLOCK_N"])
    grad_x = torch.empty_like(x) if need_x else None
    a = x.new_empty((rows, hidden)) if need_up else None
    f = x.new_empty((rows, hidden)) if need_down else None
    bias_parts = x.new_empty((programs, hidden), dtype=torch.float32) if need_down_bias else None
    scale_parts = x.new_empty((programs, 1), dtype=torch.float32) if need_scale else None
    with on(x):
        kernels.adapter_bottleneck_backward[(programs,)](
            grad_x,
            a,
            f,
            bias_parts,
            scale_parts,
            grad_output,
            kept,
            x,
            call.down_weight,
            call.down_bias,
            call.up_weight,
            call.up_bias if need_scale else None,
            call.scale,
            call.seed,
            *_numbers(call),
            **_constants(call),
            RESIDUAL_IS_X=call.residual_is_x,
            **blocks,
        )
    grad_bias = None if bias_parts is None else bias_parts.sum(0)
    grad_scale = None if scale_parts is None else scale_parts.sum(0)
    return grad_x, grad_bias, grad_scale, a, f
