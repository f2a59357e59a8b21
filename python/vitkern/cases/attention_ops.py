# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention, plain and fused, as problems made from a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import reference
from vitkern.cases.attention import MsDeformAttnCase
from vitkern.cases.attention_inputs import (
    fused_inputs,
    inside_a_cell,
    locations_of,
    make_inputs,
    off_edge_inputs,
    off_edges,
)
from vitkern.cases.record import Problem


def ms_deform_attn(
    case: MsDeformAttnCase,
    device: str,
    seed: int,
    locations: str = "",
    spread: float = 1.4,
    points_per_level: Sequence[int] = (),
    **options: Any,
) -> Problem:
    """The problem of a case. `locations`: a kind of make_inputs instead of locations off the edges of cells."""
    if locations:
        inputs = make_inputs(case, locations=locations, dtype=torch.float64, device=device, seed=seed)
    else:
        inputs = off_edge_inputs(case, device=device, seed=seed, spread=spread)
    names = ("value", "locations", "weights")
    if points_per_level:
        options["points_per_level"] = points_per_level
        inputs.sampling_locations = off_edges(
            inputs.sampling_locations.flatten(3, 4)[:, :, :, : sum(points_per_level)],
            _sizes(inputs.spatial_shapes, points_per_level),
        )
        inputs.attention_weights = inputs.attention_weights.flatten(3)[..., : sum(points_per_level)]

    def call(
        value: Tensor, *rest: Tensor, backend: str | None, tables: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        return vitkern.ms_deform_attn(value, *(tables or problem.tables), *rest, backend=backend, **options)

    problem = Problem(
        dict(zip(names, inputs.differentiable())),
        call,
        lambda *tensors: _by_grid_sample(list(case.levels), *tensors),
        tables=(inputs.spatial_shapes, inputs.level_start_index),
        wide=names[1:],
        with_heads=names,
        comparable={"locations": lambda known: inside_a_cell(known["locations"], inputs.spatial_shapes)},
    )
    return problem


def _sizes(shapes: Tensor, points_per_level: Sequence[int]) -> Tensor:
    """The (width, height) of the level of each point: [K, 2]."""
    counts = torch.tensor(points_per_level, dtype=torch.int64, device=shapes.device)
    return shapes.flip(-1).double().repeat_interleave(counts, 0)


def _by_grid_sample(sizes: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
    """The formula by grid_sample, in float32 for 16-bit inputs as under autocast: 16 bits cannot address a pixel."""
    dtype = tensors[0].dtype
    wide = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in tensors)
    return reference.ms_deform_attn_by_grid_sample(next(wide), sizes, *wide).to(dtype)


# The reference points [B, Q, L, 2], or boxes, of B images, Q queries and L levels.
FORMS: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "points": lambda batch, queries, levels: (batch, queries, levels, 2),
    "shared points": lambda batch, queries, levels: (1, queries, 1, 2),
    "boxes": lambda batch, queries, levels: (batch, queries, levels, 4),
    "shared boxes": lambda batch, queries, levels: (batch, queries, 1, 4),
}


def ms_deform_attn_fused(
    case: MsDeformAttnCase,
    device: str,
    seed: int,
    form: str = "points",
    locations: str = "",
    points_per_level: Sequence[int] = (),
    **options: Any,
) -> Problem:
    """The problem of a case: reference points anywhere in the middle, offsets from there to the plain form's locations.

    With `locations`, they are those of networks, and the reference points need no gradient, as in an encoder.
    """
    if locations:
        return _near_fused(case, device, seed, **options)
    plain = ms_deform_attn(case, device, seed, points_per_level=points_per_level)
    counts = points_per_level or (case.points,) * len(case.levels)
    if points_per_level:
        options["points_per_level"] = points_per_level
    generator = torch.Generator().manual_seed(seed + 1)
    shape = FORMS[form](case.batch, case.query_count, len(case.levels))
    points = (torch.rand(shape, generator=generator, dtype=torch.float64) * 0.6 + 0.2).to(device)
    where, weights = plain.inputs["locations"], plain.inputs["weights"]
    numbers = torch.tensor(counts, dtype=torch.int64, device=device)
    of_points = points.expand(-1, -1, len(case.levels), -1).repeat_interleave(numbers, 2)[:, :, None]
    if points.shape[-1] == 2:
        step = 1 / _sizes(plain.tables[0], counts)
    else:  # eq. (12)
        step = of_points[..., 2:] / (2 * numbers.repeat_interleave(numbers)[:, None])
    offsets = (where.flatten(3, -2) - of_points[..., :2]) / step
    logits = torch.randn(weights.flatten(3).shape, generator=generator, dtype=torch.float64).to(device)
    names = ("value", "reference_points", "offsets", "logits")

    def call(
        value: Tensor, *rest: Tensor, backend: str | None, tables: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        tables = tables or problem.tables
        return vitkern.ms_deform_attn_fused(value, *tables, *rest, backend=backend, **options)

    def by_torch(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        where = locations_of(points, offsets, plain.tables[0])
        return _by_grid_sample(list(case.levels), value, where, logits.softmax(-1).view(offsets.shape[:-1]))

    inputs = (plain.inputs["value"], points, offsets.view(where.shape).nan_to_num(), logits)
    problem = Problem(dict(zip(names, inputs)), call, by_torch, tables=plain.tables, wide=names[1:])
    return problem


def near_fused_inputs(
    case: MsDeformAttnCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Reference points at the middle of each query's near locations, in float32 as in networks, and the levels."""
    inputs = make_inputs(case, dtype=torch.float64, device=device, seed=seed)
    middle = inputs.sampling_locations.mean((2, 4))  # [B, Q, L, 2]
    value, points, *rest = fused_inputs(inputs, middle, torch.Generator().manual_seed(0))
    tensors = (value.to(dtype), points.float(), *(tensor.to(dtype) for tensor in rest))
    return tensors, (inputs.spatial_shapes, inputs.level_start_index)


def _near_fused(case: MsDeformAttnCase, device: str, seed: int, **options: Any) -> Problem:
    (value, points, offsets, logits), levels = near_fused_inputs(case, torch.float64, device, seed)

    def call(
        value: Tensor, *rest: Tensor, backend: str | None, tables: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        *sizes, points = tables or problem.tables
        given = (value, *sizes, points.to(torch.promote_types(value.dtype, torch.float32)), *rest)
        return vitkern.ms_deform_attn_fused(*given, backend=backend, **options)

    def by_torch(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        where = locations_of(points, offsets, levels[0])
        return _by_grid_sample(list(case.levels), value, where, logits.softmax(-1).view(offsets.shape[:-1]))

    def comparable(known: Mapping[str, Tensor]) -> Tensor:
        return inside_a_cell(locations_of(points, known["offsets"].double(), levels[0]), levels[0])

    inputs = {"value": value, "offsets": offsets, "logits": logits}
    problem = Problem(
        inputs,
        call,
        by_torch,
        tables=(*levels, points),
        with_heads=tuple(inputs),
        comparable={"offsets": comparable},
    )
    return problem
