# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of adapter_bottleneck: allocation and launches, on contiguous tensors of one dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkern import reference
from vitkern.ops.adapter_bottleneck import Inputs
from vitkern.ops.plan import Gradients, Needed, Plan, plan_of
from vitkern.ops.triton_common import cdiv, on
from vitkern.ops.triton_products import product_constants, sum_of_products


def plan(inputs: Inputs) -> Plan:
    return plan_of(inputs, 8, _forward, _backward)


def _blocks(inputs: Inputs, backward: bool = False) -> dict[str, int]:
    from vitkern.triton_kernels import adapter_bottleneck as kernels

    return kernels.launch_table(inputs.rows, inputs.hidden, inputs.x.element_size(), backward)


def _numbers(inputs: Inputs) -> tuple[float, int, float, int]:
    """Factor of the scale, the two numbers with which dropout compares and multiplies, and rows."""
    p = inputs.dropout_p
    return inputs.factor, reference.dropout_threshold(p), reference.dropout_rescale(p), inputs.rows


def _constants(inputs: Inputs) -> dict[str, object]:
    return {
        "C": inputs.x.shape[-1],
        "H": inputs.hidden,
        "ACTIVATION": inputs.activation,
        **product_constants(inputs.x),
    }


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output, and z for backward, which has no rows if z is not kept."""
    from vitkern.triton_kernels import adapter_bottleneck as kernels

    x, rows = inputs.x, inputs.rows
    output = torch.empty_like(x)
    kept = x.new_empty((rows if inputs.keep else 0, inputs.hidden), dtype=torch.float32)
    if output.numel() == 0:
        return output, kept
    blocks = _blocks(inputs)
    with on(x):
        kernels.adapter_bottleneck_forward[(cdiv(rows, blocks["BLOCK_N"]),)](
            output,
            kept if inputs.keep else None,
            x,
            inputs.down_weight,
            inputs.down_bias,
            inputs.up_weight,
            inputs.up_bias,
            x if inputs.residual_is_x else inputs.residual,
            inputs.scale,
            inputs.seed,
            *_numbers(inputs),
            **_constants(inputs),
            **blocks,
        )
    return output, kept


def _backward(needed: Needed, grad_output: Tensor, inputs: Inputs, kept: Tensor) -> Gradients:
    """Gradients of x, both weights and biases, and the scale; those of parameters are float32."""
    x = inputs.x
    if x.numel() == 0:
        likes = (*inputs[:5], inputs.scale)
        return [
            torch.zeros_like(like, dtype=torch.float32 if at else None) if like is not None and need else None
            for at, (like, need) in enumerate(zip(likes, needed))
        ]
    grad_x = grad_down_bias = grad_scale = a = f = None
    _, _, _, need_up, need_up_bias, _ = needed
    if any(needed[:4]) or needed[5]:
        grad_x, grad_down_bias, grad_scale, a, f = _rows(
            inputs, grad_output, kept if inputs.keep else None, needed
        )
    grad_down = grad_up = grad_up_bias = None
    channels = x.shape[-1]
    if f is not None:
        grad_down, _ = sum_of_products(f, x.view(-1, channels))
    if need_up or need_up_bias:
        grad_up, grad_up_bias = sum_of_products(
            grad_output.view(-1, channels),
            a,
            scale=inputs.scale,
            factor=inputs.factor,
            sums=need_up_bias,
        )
    return [grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_scale]


def _rows(
    inputs: Inputs, grad_output: Tensor, kept: Tensor | None, needed: Needed
) -> tuple[Tensor | None, ...]:
    """Gradients of x, b_d and the scale, and the factors of those of the weights: a for W_u, f for W_d."""
    from vitkern.triton_kernels import adapter_bottleneck_backward as kernels

    need_x, need_down, need_down_bias, need_up, _, need_scale = needed
    x, rows, hidden = inputs.x, inputs.rows, inputs.hidden
    blocks = _blocks(inputs, backward=True)
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
            inputs.down_weight,
            inputs.down_bias,
            inputs.up_weight,
            inputs.up_bias if need_scale else None,
            inputs.scale,
            inputs.seed,
            *_numbers(inputs),
            **_constants(inputs),
            RESIDUAL_IS_X=inputs.residual_is_x,
            **blocks,
        )
    grad_bias = None if bias_parts is None else bias_parts.sum(0)
    grad_scale = None
    if scale_parts is not None and inputs.scale is not None:
        grad_scale = scale_parts.sum(0).view(inputs.scale.shape)
    return grad_x, grad_bias, grad_scale, a, f
