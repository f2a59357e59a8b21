# SPDX-License-Identifier: Apache-2.0
"""A layer from RF-DETR's interface: for export, locations have levels and points on one axis.

Sizes may also come as pairs.
"""

import torch
import torch.nn.functional as F
from torch import nn


def first(level, points):
    return level * points


def one_axis(grids, level, points):
    return grids[:, :, :, first(level, points) : first(level + 1, points)]


def turned(grid):
    return grid.transpose(1, 2).flatten(0, 1)


def ms_deform_attn_core_pytorch(
    value, value_spatial_shapes, sampling_locations, attention_weights, value_spatial_shapes_hw=None
):
    batch, heads, channels, _ = value.shape
    shapes = value_spatial_shapes_hw if value_spatial_shapes_hw is not None else value_spatial_shapes
    merged = sampling_locations.ndim == 5
    queries = sampling_locations.shape[1]
    points = sampling_locations.shape[3] // len(shapes) if merged else sampling_locations.shape[4]
    values = value.split([int(h) * int(w) for h, w in shapes], 3)
    grids = 2 * sampling_locations - 1
    found = []
    for level, (h, w) in enumerate(shapes):
        image = values[level].reshape(batch * heads, channels, int(h), int(w))
        grid = one_axis(grids, level, points) if merged else grids[:, :, :, level]
        found.append(F.grid_sample(image, turned(grid), padding_mode="zeros", align_corners=False))
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    output = (torch.stack(found, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


class Exported(nn.Module):
    def __init__(self, d_model=32, n_levels=2, n_heads=4, n_points=2):
        super().__init__()
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.export = False
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj, self.output_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
        input_spatial_shapes_hw=None,
    ):
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], float(0))
        offsets = self.sampling_offsets(query).view(
            *query.shape[:2], self.n_heads, self.n_levels, self.n_points, 2
        )
        weights = self.attention_weights(query).view(*query.shape[:2], self.n_heads, -1)
        points = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            locations = points + offsets / input_spatial_shapes.flip(-1)[None, None, None, :, None]
        else:
            locations = points[..., :2] + offsets / self.n_points * points[..., 2:] * 0.5
        if self.export:
            locations = locations.flatten(3, 4)
        value = value.transpose(1, 2).unflatten(1, (self.n_heads, -1))
        return self.output_proj(
            ms_deform_attn_core_pytorch(
                value,
                input_spatial_shapes,
                locations,
                F.softmax(weights, -1),
                value_spatial_shapes_hw=input_spatial_shapes_hw,
            )
        )
