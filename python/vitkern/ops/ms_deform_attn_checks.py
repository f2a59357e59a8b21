# SPDX-License-Identifier: Apache-2.0
"""The arguments of ms_deform_attn and ms_deform_attn_fused, and their checks.

Points of unequal levels arrive flattened, [..., K, 2] with ``points_per_level``; uniform ones as [..., L, P, 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitkern.ops.checks import Contract
from vitkern.ops.plan import Spec

METHODS = ("bilinear", "nearest")


class Plain(NamedTuple):
    value: Tensor  # [B, S, M, D]
    spatial_shapes: Tensor  # [L, 2]
    level_start_index: Tensor  # [L]
    sampling_locations: Tensor  # [B, Q, M, L, P, 2] or [B, Q, M, K, 2]
    attention_weights: Tensor  # [B, Q, M, L, P] or [B, Q, M, K]
    points_per_level: Sequence[int] | None = None
    method: str = "bilinear"
    backend: str | None = None

    @property
    def locations(self) -> Tensor:
        return self.sampling_locations

    @property
    def weights(self) -> Tensor:
        return self.attention_weights


class Fused(NamedTuple):
    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    reference_points: Tensor  # [B | 1, Q, L | 1, 2 | 4]
    sampling_offsets: Tensor  # [B, Q, M, L, P, 2] or [B, Q, M, K, 2]
    attention_logits: Tensor  # [B, Q, M, K]
    points_per_level: Sequence[int] | None = None
    method: str = "bilinear"
    backend: str | None = None

    @property
    def locations(self) -> Tensor:
        return self.sampling_offsets

    @property
    def weights(self) -> Tensor:
        return self.attention_logits


Attention = Plain | Fused


def points_of(inputs: Attention) -> tuple[int, ...]:
    """The number of points of each level."""
    if inputs.points_per_level is not None:
        return tuple(inputs.points_per_level)
    return (inputs.locations.shape[4],) * inputs.locations.shape[3]


_PLAIN, _FUSED = Contract("ms_deform_attn", "value"), Contract("ms_deform_attn_fused", "value")


def check(inputs: Attention) -> list[Spec]:
    fused = isinstance(inputs, Fused)
    contract, locations, weights = _PLAIN, "sampling_locations", "attention_weights"
    if fused:
        contract, locations, weights = _FUSED, "sampling_offsets", "attention_logits"
    _check_value(contract, inputs)
    points = _check_locations(contract, locations, inputs)
    batch, _, heads, channels = inputs.value.shape
    queries = inputs.locations.shape[1]
    expected = (batch, queries, heads, *([torch.Size(points).numel()] if fused else points))
    contract.check_floating(weights, inputs.weights, inputs.value)
    contract.check_shape(weights, inputs.weights, expected, f"{list(expected)}, like {locations}")
    if isinstance(inputs, Fused):
        _check_reference_points(inputs)
    return [((batch, queries, heads * channels), inputs.value.dtype)]


def _check_value(contract: Contract, inputs: Attention) -> None:
    value, shapes, starts = inputs[:3]
    contract.check_kernel_dtype("value", value)
    if value.dim() != 4:
        contract.fail("value", "[B, S, M, D]", list(value.shape))
    if inputs.method not in METHODS:
        contract.fail("method", "'bilinear' or 'nearest'", repr(inputs.method))
    for name, table in (("spatial_shapes", shapes), ("level_start_index", starts)):
        contract.check_dense(name, table, value)
        if table.dtype.is_floating_point or table.dtype == torch.bool or table.dtype.is_complex:
            contract.refuse(name, "int64", table.dtype)
    if shapes.dim() != 2 or shapes.shape[1] != 2:
        contract.fail("spatial_shapes", "[L, 2] as (height, width)", list(shapes.shape))
    levels = shapes.shape[0]
    contract.check_shape("level_start_index", starts, (levels,), f"[L] with L={levels}")


def _check_locations(contract: Contract, name: str, inputs: Attention) -> tuple[int, ...]:
    """The axes after [B, Q, M] in the shape of the locations: (L, P), or (K,) with points_per_level."""
    (batch, _, heads, _), shape = inputs.value.shape, inputs.locations.shape
    levels, counts = inputs.spatial_shapes.shape[0], inputs.points_per_level
    contract.check_floating(name, inputs.locations, inputs.value)
    if counts is None:
        form, points = f"[B, Q, M, L, P, 2] with B={batch}, M={heads}, L={levels}", (levels, *shape[4:5])
    else:
        if len(counts) != levels or min(counts, default=0) < 0:
            contract.fail("points_per_level", f"L={levels} numbers of at least 0", list(counts))
        points = (sum(counts),)
        form = f"[B, Q, M, K, 2] with B={batch}, M={heads}, K={points[0]} points in all"
    contract.check_shape(name, inputs.locations, (batch, *shape[1:2], heads, *points, 2), form)
    return points


def _check_reference_points(inputs: Fused) -> None:
    batch, queries, levels = inputs.value.shape[0], inputs.locations.shape[1], inputs.spatial_shapes.shape[0]
    _FUSED.check_floating("reference_points", inputs.reference_points, inputs.value)
    shape = inputs.reference_points.shape
    fits = len(shape) == 4 and shape[1] == queries and shape[3] in (2, 4)
    if not (fits and shape[0] in (1, batch) and shape[2] in (1, levels)):
        expected = f"[B or 1, Q, L or 1, 2 or 4] with B={batch}, Q={queries}, L={levels}"
        _FUSED.fail("reference_points", expected, list(shape))
