# SPDX-License-Identifier: Apache-2.0
"""Baselines for ViT-Adapter: a pyramid made from a plain ViT's features only, and ViTDet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitkern.models.blocks import initialise, to_map
from vitkern.models.checkpoints import load_pretrained
from vitkern.models.pyramid import Pyramid
from vitkern.models.vit import VisionTransformer


class ViTBaseline(Pyramid, VisionTransformer):
    """Four normalised taps of the transformer, resized to strides 4, 8, 16 and 32.

    Args:
        out_indices: numbers of the tapped blocks: four, or one for all maps as in ViTDet. None: the last block of each
            quarter.
        pad_input: whether to pad images to multiples of 32 and crop the maps.
        pretrained, init_cfg: a file to load, or ``dict(type="Pretrained", checkpoint=file)``.
        **transformer: arguments of :class:`~vitkern.models.vit.VisionTransformer`.
    """

    def __init__(
        self,
        *,
        out_indices: Sequence[int] | None = None,
        pad_input: bool = False,
        pretrained: str | None = None,
        init_cfg: dict[str, Any] | None = None,
        **transformer: Any,
    ) -> None:
        super().__init__(**transformer)
        depth, channels = len(self.blocks), self.embed_dim
        self.out_indices, self.pad_input = _taps(out_indices, depth), pad_input
        self.norm1 = self.norm_layer(channels)
        self.norm2 = self.norm_layer(channels)
        self.norm3 = self.norm_layer(channels)
        self.norm4 = self.norm_layer(channels)
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, 2),
            nn.GroupNorm(32, channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.up3 = nn.Identity()
        self.up4 = nn.MaxPool2d(2)
        for part in (self.up1, self.up2):
            part.apply(initialise)
        load_pretrained(self, pretrained, init_cfg)

    def forward(self, image: Tensor) -> list[Tensor]:
        padded = self._checked(image, 32 if self.pad_input else 1)
        if min(padded.shape[2:]) < 32:
            raise ValueError(f"ViTBaseline: the image must be at least 32 x 32, got {list(image.shape[2:])}")
        x, height, width = self.embed(padded)
        taps = []
        for index, block in enumerate(self.blocks):
            x = block(x, height, width)
            if index in self.out_indices:
                taps.append(x)
        taps = taps if len(taps) == 4 else taps * 4
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        resizers = (self.up1, self.up2, self.up3, self.up4)
        maps = [
            resize(to_map(norm(tap), height, width)).contiguous()
            for resize, norm, tap in zip(resizers, norms, taps)
        ]
        return self._cropped(maps, image)


def _taps(indices: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The numbers of the tapped blocks."""
    if indices is None:
        quarters = range(depth // 4 - 1, depth, max(depth // 4, 1))
        if len(quarters) != 4:
            raise ValueError(f"out_indices must be given: {depth} blocks cannot be split into four quarters")
        return tuple(quarters)
    if len(indices) not in (1, 4) or list(indices) != sorted(set(indices) & set(range(depth))):
        raise ValueError(
            f"out_indices must be one or four of the blocks 0 to {depth - 1}, from first to last, got {indices}"
        )
    return tuple(indices)
