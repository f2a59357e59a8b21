# SPDX-License-Identifier: Apache-2.0
"""Random inputs of multi-scale deformable attention: locations as networks have them, or as proofs need them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitkern.cases.attention import MsDeformAttnCase, Size

# Pixels from a cell's edge, where gradients of locations jump and two dtypes may round to either side. Inputs made for
# proofs keep MARGIN. Points of other inputs that are nearer than EDGE are not compared.
MARGIN, EDGE = 0.15, 1e-2


@dataclass
class MsDeformAttnInputs:
    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter(vars(self).values())

    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.sampling_locations, self.attention_weights

    def to(self, dtype: torch.dtype, coordinates: torch.dtype | None = None) -> MsDeformAttnInputs:
        """Values in `dtype`; locations and weights in `coordinates`, or the same."""
        coordinates = coordinates or dtype
        return replace(
            self,
            value=self.value.detach().to(dtype),
            sampling_locations=self.sampling_locations.detach().to(coordinates),
            attention_weights=self.attention_weights.detach().to(coordinates),
        )

    def requires_grad_(self) -> MsDeformAttnInputs:
        for tensor in self.differentiable():
            tensor.requires_grad_()
        return self


def make_inputs(
    case: MsDeformAttnCase,
    *,
    locations: str = "near",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> MsDeformAttnInputs:
    """Random inputs. "uniform": locations anywhere in [0, 1], worst for a cache. "near": each query's own point of the
    grid plus Deformable-DETR's initial offsets, one direction per head and 1 to P pixels long, as layers start.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads, levels, points = case.batch, case.heads, len(case.levels), case.points
    shape = (batch, case.query_count, heads, levels, points)
    value = torch.randn(batch, case.pixels, heads, case.channels, generator=generator, dtype=torch.float64)
    weights = torch.randn(*shape[:3], levels * points, generator=generator).softmax(-1).view(shape).double()
    if locations == "uniform":
        where = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    else:
        where = _reference_points(case, generator)[None, :, None, None, None] + _initial_offsets(case)
        where = where + 0.01 * torch.randn(*shape, 2, generator=generator) / _width_height(case)[:, None]
    return MsDeformAttnInputs(
        value.to(device, dtype), *levels_of(case, device), where.to(device, dtype), weights.to(device, dtype)
    )


def levels_of(case: MsDeformAttnCase, device: str) -> tuple[Tensor, Tensor]:
    """spatial_shapes and level_start_index."""
    shapes = torch.tensor(case.levels, dtype=torch.int64, device=device).view(-1, 2)
    pixels = shapes.prod(1)
    return shapes, pixels.cumsum(0) - pixels


def off_edge_inputs(
    case: MsDeformAttnCase, *, device: str = "cpu", seed: int = 0, spread: float = 1.4
) -> MsDeformAttnInputs:
    """Inputs in float64, with locations anywhere in maps, `spread` times as wide, at such a distance from the edges of
    cells that all dtypes agree on the cell.
    """
    inputs = make_inputs(case, locations="uniform", dtype=torch.float64, device=device, seed=seed)
    width_height = inputs.spatial_shapes.flip(-1).double()[:, None]
    spread_out = (inputs.sampling_locations - 0.5) * spread + 0.5
    return replace(inputs, sampling_locations=off_edges(spread_out, width_height))


def off_edges(locations: Tensor, width_height: Tensor) -> Tensor:
    """Locations moved within their cells, away from the edges."""
    pixels = locations * width_height - 0.5
    cell = pixels.floor()
    return (cell + (pixels - cell).clamp(MARGIN, 1 - MARGIN) + 0.5) / width_height.clamp(min=1)


def inside_a_cell(locations: Tensor, spatial_shapes: Tensor) -> Tensor:
    """Whether a location [..., L, P, 2] is so far from edges of cells that dtypes agree on its cell: [..., L, P, 1]."""
    pixel = locations.double() * spatial_shapes.flip(1)[:, None] - 0.5  # (x, y), as locations are
    return ((pixel - pixel.round()).abs() > EDGE).all(-1, keepdim=True)


def fused_inputs(
    inputs: MsDeformAttnInputs, points: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the fused form: the same value, these reference points [B, Q, L, 2], offsets from there to the same
    locations, random logits.
    """
    sizes = inputs.spatial_shapes.flip(-1)[:, None]
    offsets = (inputs.sampling_locations - points[:, :, None, :, None]) * sizes
    shape = inputs.attention_weights.flatten(3).shape
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(points.device)
    return inputs.value, points, offsets, logits


def locations_of(points: Tensor, offsets: Tensor, spatial_shapes: Tensor) -> Tensor:
    """Locations of the fused form in the usual formula: points [B | 1, Q, L | 1, 2 | 4], offsets [B, Q, M, L, P, 2]."""
    points = points[:, :, None, :, None]
    if points.shape[-1] == 2:
        return points + offsets / spatial_shapes.flip(-1)[:, None]
    return points[..., :2] + offsets / offsets.shape[-2] * points[..., 2:] / 2


def _width_height(case: MsDeformAttnCase) -> Tensor:  # [L, 2]
    return torch.tensor(case.levels, dtype=torch.float64).view(-1, 2).flip(-1)


def _reference_points(case: MsDeformAttnCase, generator: torch.Generator) -> Tensor:  # [Q, 2] as (x, y)
    if isinstance(case.queries, int):
        return torch.rand(case.queries, 2, generator=generator, dtype=torch.float64)
    return pixel_centres(case.queries)


def pixel_centres(grids: Sequence[Size]) -> Tensor:
    """Every pixel of every grid as (x, y) in [0, 1]: [Q, 2] in float64."""
    centres = []
    for height, width in grids:
        y, x = torch.meshgrid(
            (torch.arange(height, dtype=torch.float64) + 0.5) / height,
            (torch.arange(width, dtype=torch.float64) + 0.5) / width,
            indexing="ij",
        )
        centres.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(centres)


def _initial_offsets(case: MsDeformAttnCase) -> Tensor:  # [M, L, P, 2] in units of the level's size
    angle = torch.arange(case.heads, dtype=torch.float64) * (2 * math.pi / case.heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    distance = torch.arange(1, case.points + 1, dtype=torch.float64)
    return direction[:, None, None] * distance[:, None] / _width_height(case)[:, None]
