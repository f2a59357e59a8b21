# SPDX-License-Identifier: Apache-2.0
"""What ms_deform_attn and ms_deform_attn_fused ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkern.ops.checks import Contract
from vitkern.ops.derivative import Spec

METHODS = ("bilinear", "nearest")


class MsDeformAttnContract(Contract):
    """The checks of one of the two ops, whose messages name it and its arguments."""

    def __init__(self, op: str, locations: str, weights: str) -> None:
        super().__init__(op, leader="value")
        self.locations, self.weights = locations, weights

    def check_value(
        self, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, method: str
    ) -> None:
        self.check_kernel_dtype("value", value)
        if value.dim() != 4:
            self.fail("value", "[B, S, M, D]", list(value.shape))
        if method not in METHODS:
            self.fail("method", "'bilinear' or 'nearest'", repr(method))
        for name, table in (("spatial_shapes", spatial_shapes), ("level_start_index", level_start_index)):
            self.check_dense(name, table, value)
            if table.dtype.is_floating_point or table.dtype == torch.bool or table.dtype.is_complex:
                self.refuse(name, "int64", table.dtype)
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            self.fail("spatial_shapes", "[L, 2] as (height, width)", list(spatial_shapes.shape))
        levels = spatial_shapes.shape[0]
        self.check_shape("level_start_index", level_start_index, (levels,), f"[L] with L={levels}")

    def check_locations(
        self, value: Tensor, spatial_shapes: Tensor, locations: Tensor, points_per_level: Sequence[int] | None
    ) -> tuple[int, ...]:
        """What follows [B, Q, M] in the shape of the locations: (L, P), or (K,) with points_per_level."""
        self.check_floating(self.locations, locations, value)
        levels, (batch, _, heads, _), shape = spatial_shapes.shape[0], value.shape, locations.shape
        if points_per_level is None:
            form, points = f"[B, Q, M, L, P, 2] with B={batch}, M={heads}, L={levels}", (levels, *shape[4:5])
        else:
            if len(points_per_level) != levels or min(points_per_level, default=0) < 0:
                self.fail("points_per_level", f"L={levels} numbers of at least 0", list(points_per_level))
            points = (sum(points_per_level),)
            form = f"[B, Q, M, K, 2] with B={batch}, M={heads}, K={points[0]} points in all"
        self.check_shape(self.locations, locations, (batch, *shape[1:2], heads, *points, 2), form)
        return points

    def check_weights(self, value: Tensor, weights: Tensor, expected: tuple[int, ...]) -> None:
        self.check_floating(self.weights, weights, value)
        self.check_shape(self.weights, weights, expected, f"{list(expected)}, like {self.locations}")


PLAIN = MsDeformAttnContract("ms_deform_attn", "sampling_locations", "attention_weights")
FUSED = MsDeformAttnContract("ms_deform_attn_fused", "sampling_offsets", "attention_logits")


def check_plain(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    points_per_level: Sequence[int] | None,
    method: str,
    backend: str | None,
) -> list[Spec]:
    PLAIN.check_value(value, shapes, starts, method)
    points = PLAIN.check_locations(value, shapes, locations, points_per_level)
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    PLAIN.check_weights(value, weights, (batch, queries, heads, *points))
    return [((batch, queries, heads * channels), value.dtype)]


def check_fused(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    points_per_level: Sequence[int] | None,
    method: str,
    backend: str | None,
) -> list[Spec]:
    FUSED.check_value(value, shapes, starts, method)
    points = FUSED.check_locations(value, shapes, offsets, points_per_level)
    batch, _, heads, channels = value.shape
    queries, levels, total = offsets.shape[1], shapes.shape[0], torch.Size(points).numel()
    FUSED.check_weights(value, logits, (batch, queries, heads, total))
    FUSED.check_floating("reference_points", reference_points, value)
    shape = reference_points.shape
    fits = len(shape) == 4 and shape[1] == queries and shape[3] in (2, 4)
    if not (fits and shape[0] in (1, batch) and shape[2] in (1, levels)):
        expected = f"[B or 1, Q, L or 1, 2 or 4] with B={batch}, Q={queries}, L={levels}"
        FUSED.fail("reference_points", expected, list(shape))
    return [((batch, queries, heads * channels), value.dtype)]
