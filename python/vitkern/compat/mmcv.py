# SPDX-License-Identifier: Apache-2.0
"""mmcv's layer and functions of multi-scale deformable attention, under mmcv's names; mmcv itself is not needed.

``vitkern.install("mmcv")`` gives mmcv's own class another ``forward``, so that registries, layers built before and
every isinstance stay right, and supplies ``mmcv._ext`` where mmcv lacks it: mmcv-lite.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from vitkern.compat.deformable_detr import MSDeformAttnFunction as MultiScaleDeformableAttnFunction
from vitkern.compat.deformable_detr import ms_deform_attn_backward as _gradients
from vitkern.compat.deformable_detr import ms_deform_attn_core_pytorch as multi_scale_deformable_attn_pytorch
from vitkern.compat.deformable_detr import ms_deform_attn_forward
from vitkern.compat.layers import attend_as_mmcv
from vitkern.nn import MSDeformAttn

__all__ = [
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "multi_scale_deformable_attn_pytorch",
]


class MultiScaleDeformableAttention(MSDeformAttn):
    """mmcv's layer: multi-scale deformable attention with its projections, dropout, and the identity added.

    Args:
        embed_dims, num_heads, num_levels, num_points: C, M, L and P.
        im2col_step: without effect: any batch size runs.
        dropout: of the result, before the identity is added.
        batch_first: whether queries and values are [B, Q, C] rather than [Q, B, C].
        norm_cfg, init_cfg: kept, and without effect, as in mmcv: the layer initialises itself.
        value_proj_ratio: channels of the projected value over embed_dims.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__(
            embed_dims, num_levels, num_heads, num_points, value_proj_ratio, im2col_step=im2col_step
        )
        self.embed_dims, self.num_heads = embed_dims, num_heads
        self.num_levels, self.num_points = num_levels, num_points
        self.dropout = nn.Dropout(dropout)
        self.batch_first, self.norm_cfg, self.init_cfg = batch_first, norm_cfg, init_cfg
        self.is_init = True  # mmengine then leaves the parameters unchanged

    def init_weights(self) -> None:
        self._reset_parameters()

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """dropout(attention) + identity, or + query without one; `key` is not used. Shapes are in attend_as_mmcv."""
        if "residual" in others:
            if identity is not None:
                raise TypeError(
                    "MultiScaleDeformableAttention: residual is the old name of identity: give one of them"
                )
            warnings.warn('"residual" is deprecated, it is called "identity" now', DeprecationWarning, 2)
            identity = others["residual"]
        output = attend_as_mmcv(
            self,
            query,
            value,
            query_pos,
            key_padding_mask,
            reference_points,
            spatial_shapes,
            level_start_index,
        )
        return self.dropout(output) + (query if identity is None else identity)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int | Tensor = 64,
) -> None:
    """Writes the gradients into the last three tensors, as mmcv._ext does."""
    inputs = (
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
    )
    gradients = _gradients(*inputs, grad_output)
    for given, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients):
        given.copy_(gradient)


def get_compiler_version() -> str:
    """The compiler's version, which mmcv.utils.collect_env reads from its compiled module."""
    return f"none: vitkern {metadata.version('vitkern')} in place of mmcv._ext"


def get_compiling_cuda_version() -> str:
    return "not available"


EXTENSION = (
    ms_deform_attn_forward,
    ms_deform_attn_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)
