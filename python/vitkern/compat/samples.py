# SPDX-License-Identifier: Apache-2.0
"""A small layer of a class of another project, made without its constructor: for a trial before a model exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHANNELS, HEADS, LEVELS, POINTS = 32, 4, 2, 4


def _bare(kind: Any, **attributes: Any) -> Any:
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    vars(layer).update(attributes, training=False)
    return layer


def _linear(outputs: int) -> nn.Linear:
    return nn.Linear(CHANNELS, outputs, device="meta")  # a trial reads no weights


def _add_children(layer: nn.Module, *, projected: bool = True) -> None:
    count = HEADS * LEVELS * POINTS
    layer.sampling_offsets, layer.attention_weights = _linear(2 * count), _linear(count)
    if projected:
        layer.value_proj, layer.output_proj = _linear(CHANNELS), _linear(CHANNELS)


def deformable_detr(kind: Any, core: Any = None) -> nn.Module:
    """A layer with the attributes of Deformable-DETR, or of most of transformers, whose layers have a core too."""
    sizes = {"d_model": CHANNELS, "n_heads": HEADS, "n_levels": LEVELS, "n_points": POINTS}
    layer: nn.Module = _bare(kind, im2col_step=64, **sizes)
    _add_children(layer)
    if core is not None:
        layer.attn = core()
    return layer


def rt_detr_v2(kind: Any) -> nn.Module:
    layer = deformable_detr(kind)
    points = [POINTS] * LEVELS
    vars(layer).update(n_points_list=points, offset_scale=0.5, method="default")
    layer.register_buffer("n_points_scale", torch.empty(sum(points), device="meta"))
    return layer


def d_fine(kind: Any, core: Any) -> nn.Module:
    sizes = {"d_model": CHANNELS, "n_heads": HEADS, "n_levels": LEVELS, "n_points": POINTS}
    points = [POINTS] * LEVELS
    options = {"offset_scale": 0.5, "decoder_method": "default", "ms_deformable_attn_core": core}
    layer: nn.Module = _bare(
        kind, num_points_list=points, total_points=HEADS * sum(points), **sizes, **options
    )
    _add_children(layer, projected=False)
    layer.register_buffer("num_points_scale", torch.empty(sum(points), device="meta"))
    return layer


def mmcv(kind: Any) -> nn.Module:
    sizes = {"embed_dims": CHANNELS, "embed_dim": CHANNELS, "num_heads": HEADS}
    sizes |= {"num_levels": LEVELS, "num_points": POINTS}
    layer: nn.Module = _bare(kind, im2col_step=64, batch_first=False, **sizes)
    _add_children(layer)
    layer.dropout = nn.Dropout(0.1)
    return layer
