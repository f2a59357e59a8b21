# SPDX-License-Identifier: Apache-2.0
"""Cases of multi-scale deformable attention.

Sources: the configurations of Deformable-DETR, DINO, Mask2Former, ViT-Adapter, RT-DETR, LW-DETR, RF-DETR and BEVFormer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

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
_HUB = _pyramid(512, 512, (8, 16, 32, 64))
_BEV = ((116, 200), (58, 100), (29, 50), (15, 25))


def _vit_adapter() -> list[MsDeformAttnCase]:
    """Injectors, where the ViT's grid samples the pyramid, and extractors, where the pyramid samples the grid."""
    variants = {"T": (6, 32), "S": (6, 64), "B": (12, 32), "L": (16, 32)}
    cases = []
    for size, names in ((512, "TSBL"), (640, "BL"), (896, "BL"), (1024, "SBL")):
        pyramid, grid = _pyramid(size, size, (8, 16, 32)), _pyramid(size, size, (16,))
        for name in names:
            heads, channels = variants[name]
            for role, levels, queries in (("injector", pyramid, grid), ("extractor", grid, pyramid)):
                what = f"ViT-Adapter-{name} {role}"
                cases.append(
                    MsDeformAttnCase(f"{role}-{name}{size}", what, 2, levels, queries, heads, channels, 4)
                )
    return cases


def _of_today() -> list[MsDeformAttnCase]:
    """DINOv3's adapter and head, RF-DETR with two points, and the head widths of DEIMv2."""
    head, extractor, detector = "DINOv3 Mask2Former head", "DINOv3 adapter, extractor", "RF-DETR"
    rows: list[tuple[Any, ...]] = [("dinov3-m2f", head, 2, _M2F[896], _M2F[896], 16, 128, 4)]
    for name, size, channels in (("7B", 896, 128), ("H", 896, 40), ("B", 512, 24), ("S", 512, 12)):
        grid, pyramid = _pyramid(size, size, (16,)), _pyramid(size, size, (8, 16, 32))
        rows.append((f"dinov3-extractor-{name}", extractor, 2, grid, pyramid, 16, channels, 4))
    rows += [
        ("rfdetr-medium", detector, 8, ((36, 36),), 300, 16, 16, 2),
        ("rfdetr-large", f"{detector}, training", 8, ((44, 44),), 3900, 16, 16, 2),
        ("rfdetr-keypoint", f"{detector} keypoints, training", 2, ((48, 48),), 22100, 16, 16, 2),
        ("deimv2-s", "DEIMv2-S decoder", 16, _RT, 500, 8, 24, 4),
        ("deimv2-l", "DEIMv2-L decoder", 16, _RT, 500, 8, 28, 4),
        ("deimv2-atto", "DEIMv2-atto decoder", 16, _RT[1:], 300, 8, 8, 4),
    ]
    return [MsDeformAttnCase(*row) for row in rows]


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
        MsDeformAttnCase("hub-small", "transformers hub benchmark", 2, _HUB, 300, 8, 32, 4),
        *_vit_adapter(),
        *_of_today(),
    )
}
