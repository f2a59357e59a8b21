# SPDX-License-Identifier: Apache-2.0
"""Cases of multi-scale deformable attention, and the inputs that are made of them.

Sources: the configurations of Deformable-DETR, DINO, Mask2Former, ViT-Adapter, RT-DETR, LW-DETR, RF-DETR and BEVFormer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class MsDeformAttnCase:
    name: str
    what: str
    batch: int
    levels: tuple[Size, ...]
    queries: int | tuple[Size, ...]  # a number, or the pixel grids whose every centre is a query
    heads: int
    channels: int  # of one head
    points: int  # of one level

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.levels)

    @property
    def query_count(self) -> int:
        if isinstance(self.queries, int):
            return self.queries
        return sum(height * width for height, width in self.queries)

    def shrunk(self) -> MsDeformAttnCase:
        """The same dispatch at a size for exhaustive checks: small odd maps, few queries, the same D, L and P."""
        levels = tuple((height // 16 + 1, width // 12 + 1) for height, width in self.levels)
        return replace(self, batch=min(self.batch, 2), levels=levels, queries=11, heads=min(self.heads, 3))

    def with_batch(self, batch: int) -> MsDeformAttnCase:
        return replace(self, batch=batch)


def _pyramid(height: int, width: int, strides: tuple[int, ...]) -> tuple[Size, ...]:
    return tuple((math.ceil(height / stride), math.ceil(width / stride)) for stride in strides)


_DETR = _pyramid(800, 1333, (8, 16, 32, 64))
_M2F = {size: _pyramid(size, size, (32, 16, 8)) for size in (512, 640, 896, 1024)}  # coarse level first
_RT = _pyramid(640, 640, (8, 16, 32))
_BEV = ((116, 200), (58, 100), (29, 50), (15, 25))


def _vit_adapter() -> list[MsDeformAttnCase]:
    """Injectors ask the pyramid from the ViT's grid, extractors ask that grid from the pyramid."""
    variants = {"T": (6, 32), "S": (6, 64), "B": (12, 32), "L": (16, 32)}
    cases = []
    for size, names in ((512, "TSBL"), (640, "BL"), (896, "BL"), (1024, "SBL")):
        pyramid, grid = _pyramid(size, size, (8, 16, 32)), _pyramid(size, size, (16,))
        for name in names:
            heads, channels = variants[name]
            cases += [
                MsDeformAttnCase(
                    f"injector-{name}{size}",
                    f"ViT-Adapter-{name} injector",
                    2,
                    pyramid,
                    grid,
                    heads,
                    channels,
                    4,
                ),
                MsDeformAttnCase(
                    f"extractor-{name}{size}",
                    f"ViT-Adapter-{name} extractor",
                    2,
                    grid,
                    pyramid,
                    heads,
                    channels,
                    4,
                ),
            ]
    return cases


ATTENTION_CASES = {
    case.name: case
    for case in (
        MsDeformAttnCase("detr-encoder", "Deformable-DETR, DINO encoder 800x1333", 2, _DETR, _DETR, 8, 32, 4),
        MsDeformAttnCase("detr-decoder", "Deformable-DETR decoder", 2, _DETR, 300, 8, 32, 4),
        MsDeformAttnCase("dino-decoder", "DINO, Grounding-DINO decoder", 2, _DETR, 900, 8, 32, 4),
        MsDeformAttnCase("dino-denoising", "DINO decoder, training", 2, _DETR, 1100, 8, 32, 4),
        MsDeformAttnCase("m2f-512", "Mask2Former pixel decoder", 4, _M2F[512], _M2F[512], 8, 32, 4),
        MsDeformAttnCase("m2f-640", "Mask2Former pixel decoder", 4, _M2F[640], _M2F[640], 8, 32, 4),
        MsDeformAttnCase("m2f-1024", "Mask2Former pixel decoder", 2, _M2F[1024], _M2F[1024], 8, 32, 4),
        MsDeformAttnCase("m2f-vit-l", "ViT-Adapter-L Mask2Former head", 2, _M2F[896], _M2F[896], 32, 32, 4),
        MsDeformAttnCase("rtdetr-decoder", "RT-DETR decoder 640", 8, _RT, 300, 8, 32, 4),
        MsDeformAttnCase("rtdetr-denoising", "RT-DETR decoder, training", 16, _RT, 500, 8, 32, 4),
        MsDeformAttnCase("lwdetr-decoder", "LW-DETR, RF-DETR decoder", 8, ((40, 40),), 300, 16, 16, 4),
        MsDeformAttnCase(
            "rfdetr-groups", "RF-DETR, training with 13 groups", 8, ((40, 40),), 3900, 16, 16, 4
        ),
        MsDeformAttnCase("bev-temporal", "BEVFormer temporal", 2, ((200, 200),), ((200, 200),), 8, 32, 4),
        MsDeformAttnCase("bev-spatial", "BEVFormer spatial, a camera", 6, _BEV, 10000, 8, 32, 8),
        MsDeformAttnCase("bev-tiny", "BEVFormer-tiny spatial", 6, ((15, 25),), 1000, 8, 32, 8),
        MsDeformAttnCase(
            "hub-small",
            "transformers hub benchmark",
            2,
            ((64, 64), (32, 32), (16, 16), (8, 8)),
            300,
            8,
            32,
            4,
        ),
        *_vit_adapter(),
    )
}


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
    grid plus Deformable-DETR's initial offsets, one direction a head and 1 to P pixels far, as layers start.
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
    shapes = torch.tensor(case.levels, dtype=torch.int64, device=device).view(-1, 2)
    pixels = shapes.prod(1)
    return MsDeformAttnInputs(
        value.to(device, dtype),
        shapes,
        pixels.cumsum(0) - pixels,
        where.to(device, dtype),
        weights.to(device, dtype),
    )


def _width_height(case: MsDeformAttnCase) -> Tensor:  # [L, 2]
    return torch.tensor(case.levels, dtype=torch.float64).view(-1, 2).flip(-1)


def _reference_points(case: MsDeformAttnCase, generator: torch.Generator) -> Tensor:  # [Q, 2] as (x, y)
    if isinstance(case.queries, int):
        return torch.rand(case.queries, 2, generator=generator, dtype=torch.float64)
    grids = []
    for height, width in case.queries:
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
        )
        grids.append(torch.stack([x, y], -1).view(-1, 2).double())
    return torch.cat(grids)


def _initial_offsets(case: MsDeformAttnCase) -> Tensor:  # [M, L, P, 2] in units of the level's size
    angle = torch.arange(case.heads, dtype=torch.float64) * (2 * math.pi / case.heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    distance = torch.arange(1, case.points + 1, dtype=torch.float64)
    return direction[:, None, None] * distance[:, None] / _width_height(case)[:, None]
