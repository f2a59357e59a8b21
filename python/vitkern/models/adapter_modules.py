# SPDX-License-Identifier: Apache-2.0
"""The parts of ViT-Adapter beside the transformer: spatial prior, injectors and extractors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkern.models.blocks import DropPath, Layer, SyncBatchNorm, checkpointed, to_map
from vitkern.nn import MSDeformAttn


class Queries(NamedTuple):
    """The geometry of the queries: the arguments of MSDeformAttn that are not features."""

    reference_points: Tensor  # [1, Q, 1, 2]: the centre of each query's cell, the same on each level
    spatial_shapes: Tensor  # [L, 2]
    level_start_index: Tensor  # [L]


def _integers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor, filled in on the device: a CUDA graph cannot record a copy from the host."""
    return torch.cat([torch.full((1,), number, dtype=torch.long, device=device) for number in numbers])


def _centres(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The (x, y) centres of a grid's cells, row by row: [H W, 2]."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


def _queries(of: Sequence[tuple[int, int]], on: Sequence[tuple[int, int]], image: Tensor) -> Queries:
    device, dtype = image.device, torch.promote_types(image.dtype, torch.float32)
    centres = torch.cat([_centres(height, width, device, dtype) for height, width in of])
    starts = [sum(height * width for height, width in on[:level]) for level in range(len(on))]
    shapes = _integers([length for size in on for length in size], device).view(-1, 2)
    return Queries(centres[None, :, None], shapes, _integers(starts, device))


def deform_inputs(image: Tensor) -> tuple[Queries, Queries]:
    """The geometry of the injectors (patches query the pyramid of 1/8, 1/16, 1/32) and of the extractors (reverse)."""
    height, width = image.shape[2] // 16, image.shape[3] // 16
    pyramid = [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]
    patches = [(height, width)]
    return _queries(patches, pyramid, image), _queries(pyramid, patches, image)


class DWConv(nn.Module):
    """One depthwise convolution for the three levels of the pyramid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, 21 n, C], H W = 4 n
        sizes = [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]
        levels = x.split([rows * columns for rows, columns in sizes], dim=1)
        maps = [self.dwconv(to_map(level, *size)) for level, size in zip(levels, sizes)]
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)


class ConvFFN(nn.Module):
    def __init__(self, channels: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.drop(self.act(self.dwconv(self.fc1(x), height, width)))
        return self.drop(self.fc2(x))


class Injector(nn.Module):
    """Adds features of the pyramid to the transformer's tokens, scaled by gamma, which starts at `init_values`."""

    def __init__(
        self, channels: int, attention: MSDeformAttn, norm_layer: Layer, init_values: float, with_cp: bool
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.query_norm = norm_layer(channels)
        self.feat_norm = norm_layer(channels)
        self.attn = attention
        self.gamma = nn.Parameter(torch.full((channels,), init_values))

    def forward(self, x: Tensor, c: Tensor, queries: Queries) -> Tensor:  # [B, H W, D], [B, 21 n, D]
        def body(x: Tensor, c: Tensor) -> Tensor:
            points, shapes, starts = queries
            return x + self.gamma * self.attn(self.query_norm(x), points, self.feat_norm(c), shapes, starts)

        return checkpointed(body, x, c, with_cp=self.with_cp)


class Extractor(nn.Module):
    """Adds features of the transformer's tokens to the pyramid."""

    def __init__(
        self,
        channels: int,
        attention: MSDeformAttn,
        norm_layer: Layer,
        with_cffn: bool,
        cffn_ratio: float,
        drop_path: float,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.query_norm = norm_layer(channels)
        self.feat_norm = norm_layer(channels)
        self.attn = attention
        self.with_cffn = with_cffn
        if with_cffn:
            self.ffn = ConvFFN(channels, int(channels * cffn_ratio))
            self.ffn_norm = norm_layer(channels)
            self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, x: Tensor, queries: Queries, height: int, width: int) -> Tensor:
        def body(c: Tensor, x: Tensor) -> Tensor:
            points, shapes, starts = queries
            c = c + self.attn(self.query_norm(c), points, self.feat_norm(x), shapes, starts)
            if self.with_cffn:
                c = c + self.drop_path(self.ffn(self.ffn_norm(c), height, width))
            return c

        return checkpointed(body, c, x, with_cp=self.with_cp)


class InteractionBlock(nn.Module):
    """An injector, some blocks of the transformer and an extractor; the last interaction has two more extractors."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        n_points: int,
        deform_ratio: float,
        norm_layer: Layer,
        init_values: float,
        with_cffn: bool,
        cffn_ratio: float,
        drop_path: float,
        extra_extractor: bool,
        with_cp: bool,
        backend: str | None,
    ) -> None:
        super().__init__()

        def attention(levels: int) -> MSDeformAttn:
            return MSDeformAttn(channels, levels, num_heads, n_points, deform_ratio, backend=backend)

        def extractor() -> Extractor:
            return Extractor(channels, attention(1), norm_layer, with_cffn, cffn_ratio, drop_path, with_cp)

        self.injector = Injector(channels, attention(3), norm_layer, init_values, with_cp)
        self.extractor = extractor()
        self.extra_extractors = nn.ModuleList([extractor(), extractor()]) if extra_extractor else None

    def forward(
        self,
        x: Tensor,  # [B, H W, D]
        c: Tensor,  # [B, 21 n, D]
        cls: Tensor | None,  # [B, 1, D]
        blocks: Sequence[nn.Module],
        queries: tuple[Queries, Queries],
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.injector(x, c, queries[0])
        if cls is not None:
            x = torch.cat([cls, x], dim=1)
        for block in blocks:
            x = block(x, height, width)
        if cls is not None:
            cls, x = x[:, :1], x[:, 1:]
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            c = extractor(c, x, queries[1], height, width)
        return x, c, cls


def _conv(channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
    return [convolution, SyncBatchNorm(out_channels), nn.ReLU(inplace=True)]


class SpatialPriorModule(nn.Module):
    """A convolutional pyramid of the image: a map at 1/4, tokens at 1/8, 1/16 and 1/32."""

    def __init__(self, inplanes: int, embed_dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(in_chans, inplanes, 2),
            *_conv(inplanes, inplanes, 1),
            *_conv(inplanes, inplanes, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv(inplanes, 2 * inplanes, 2))
        self.conv3 = nn.Sequential(*_conv(2 * inplanes, 4 * inplanes, 2))
        self.conv4 = nn.Sequential(*_conv(4 * inplanes, 4 * inplanes, 2))
        self.fc1 = nn.Conv2d(inplanes, embed_dim, 1)
        self.fc2 = nn.Conv2d(2 * inplanes, embed_dim, 1)
        self.fc3 = nn.Conv2d(4 * inplanes, embed_dim, 1)
        self.fc4 = nn.Conv2d(4 * inplanes, embed_dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        c2, c3, c4 = (
            fc(c).flatten(2).transpose(1, 2) for fc, c in ((self.fc2, c2), (self.fc3, c3), (self.fc4, c4))
        )
        return self.fc1(c1), c2, c3, c4
