# SPDX-License-Identifier: Apache-2.0
"""Allocates for the Triton kernels of the adapter bottleneck and launches them. Callers have checked everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkern import reference
from vitkern.ops.triton_launch import _cdiv, _on
from vitkern.ops.triton_products import product_constants, sum_of_products


def _blocks(call) -> dict[str, int]:
    from vitkern.triton_kernels import adapter_bottleneck as kernels

    hidden = call.down_weight.shape[0]
    if hidden > kernels.MAX_HIDDEN:
        raise ValueError(
            f"adapter_bottleneck: down_weight must have at most {kernels.MAX_HIDDEN} hidden units "
            f"for backend 'triton', got {hidden}"
        )
    return kernels.launch_table(call.x.shape[0], hidden, call.x.element_size())


def _numbers(call) -> tuple:
    """Factor of the scale, and what dropout compares and multiplies with."""
    p = call.dropout_p
    return call.factor, reference.dropout_threshold(p), reference.dropout_rescale(p), call.x.shape[0]


def _constants(call) -> dict[str, Any]:
    return {
        "C": call.x.shape[1],
        "H": call.down_weight.shape[0],
        "ACTIVATION": call.activation,
        **product_constants(call.x),
    }


def adapter_bottleneck_forward_triton(call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The output, and z for backward if it is to be kept."""
    from vitkern.triton_kernels import adapter_bottleneck as kernels

    rows, hidden, x = call.x.shape[0], call.down_weight.shape[0], call.x
    blocks = _blocks(call)
    output = torch.empty_like(x)
    kept = torch.empty((rows, hidden), dtype=torch.float32, device=x.device) if keep else None
    if output.numel() == 0:
        return output, kept
    with _on(x):
        kernels.adapter_bottleneck_forward[(_cdiv(rows, blocks["BLOCK_N"]),)](
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
    call, grad_output: Tensor, kept: Tensor | None, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of x, both weights and biases, and the scale; those of parameters are float."""
    parameters = (call.down_weight, call.down_bias, call.up_weight, call.up_bias, call.scale)
    if call.x.numel() == 0:
        zeros = [torch.zeros_like(call.x)]
        zeros += [None if p is None else torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        return [zero if need else None for zero, need in zip(zeros, needed)]

    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scale = needed
    gradients: list[Tensor | None] = [None] * 6
    a = f = None
    if need_x or need_down or need_down_bias or need_up or need_scale:
        gradients[0], a, f, gradients[2], gradients[5] = _rows(call, grad_output, kept, needed)
    if need_down:
        gradients[1] = sum_of_products(f[None], call.x[None])[0][0]
    if need_up or need_up_bias:
        hidden = call.x if a is None else a  # none of it is read where only the bias is wanted
        products, sums = sum_of_products(
            grad_output[None],
            hidden[None],
            scale=call.scale,
            factor=call.factor,
            products=need_up,
            sums=need_up_bias,
        )
        gradients[3] = products[0] if need_up else None
        gradients[4] = sums[0] if need_up_bias else None
    return gradients


def _rows(call, grad_output: Tensor, kept: Tensor | None, needed: tuple[bool, ...]) -> tuple:
    """The gradient of x, a and f for those of the weights, and the gradients of b_d and of the scale."""
    from vitkern.triton_kernels import adapter_bottleneck_backward as kernels

    need_x, need_down, need_down_bias, need_up, _, need_scale = needed
    x, (rows, hidden) = call.x, (call.x.shape[0], call.down_weight.shape[0])
    blocks = _blocks(call)
    programs = _cdiv(rows, blocks["BLOCK_N"])
    floats = {"dtype": torch.float32, "device": x.device}
    grad_x = torch.empty_like(x) if need_x else None
    a = torch.empty((rows, hidden), dtype=x.dtype, device=x.device) if need_up else None
    f = torch.empty((rows, hidden), dtype=x.dtype, device=x.device) if need_down else None
    bias_parts = torch.empty((programs, hidden), **floats) if need_down_bias else None
    scale_parts = torch.empty((programs, 1), **floats) if need_scale else None
    with _on(x):
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
    return grad_x, a, f, grad_bias, grad_scale
