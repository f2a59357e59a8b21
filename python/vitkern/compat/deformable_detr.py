# SPDX-License-Identifier: Apache-2.0
"""The op of Deformable-DETR under its own names, which ViT-Adapter, Mask2Former, DINO and many others have copied.

``MSDeformAttn``, ``MSDeformAttnFunction`` and ``ms_deform_attn_core_pytorch`` are the names in their ``ops`` packages;
``ms_deform_attn_forward`` and ``ms_deform_attn_backward``, those in their module MultiScaleDeformableAttention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkern import functional, reference
from vitkern.nn import MSDeformAttn
from vitkern.ops import backends
from vitkern.ops.ms_deform_attn import ms_deform_attn

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "ms_deform_attn_backward",
    "ms_deform_attn_core_pytorch",
    "ms_deform_attn_forward",
]

_OPTIONS = (None, "bilinear", None)  # points_per_level, method, backend


class MSDeformAttnFunction:
    """The interface of the autograd function: ``apply`` is the op, with its own gradients, autocast and compilation."""

    @staticmethod
    def apply(
        value: Tensor,  # [B, S, M, D]
        value_spatial_shapes: Tensor,  # [L, 2] as (height, width)
        value_level_start_index: Tensor,  # [L]
        sampling_locations: Tensor,  # [B, Q, M, L, P, 2] as (x, y)
        attention_weights: Tensor,  # [B, Q, M, L, P]
        im2col_step: int | Tensor = 64,  # without effect: any batch size runs
    ) -> Tensor:  # [B, Q, M * D]
        return functional.ms_deform_attn(
            value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        )


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The formula in plain torch, one grid_sample per level. It never runs a kernel: kernels are compared with it."""
    sizes = [(int(height), int(width)) for height, width in value_spatial_shapes]
    return reference.ms_deform_attn_by_grid_sample(value, sizes, sampling_locations, attention_weights)


@torch.no_grad()
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int | Tensor = 64,
) -> Tensor:
    """The same as the compiled function: no autograd, and no autocast; the result has value's dtype."""
    return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight, *_OPTIONS)


@torch.no_grad()
def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int | Tensor = 64,
) -> list[Tensor]:
    """The gradients of value, sampling_loc and attn_weight."""
    inputs = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    if backends.choose(value.device, value.dtype, None) == "reference":
        return _backward_of_reference(inputs, grad_output)
    needed = [True, True, True]
    return list(torch.ops.vitkern.ms_deform_attn_backward(grad_output, needed, *inputs))


def _backward_of_reference(inputs: tuple[Tensor, ...], grad_output: Tensor) -> list[Tensor]:
    """The gradients if no kernel runs: torch differentiates the forward pass, run again."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    with torch.enable_grad():
        output = ms_deform_attn(*leaves, *_OPTIONS)
    return list(torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], grad_output))
