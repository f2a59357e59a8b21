# SPDX-License-Identifier: Apache-2.0
"""Visual Transformers (arXiv 2006.03677): a few tokens summarise the pixels of a map; a transformer relates them.

There is no official code. The paper leaves some widths open; the defaults reproduce its parameter counts for ResNet-18
and ResNet-34 and the operation counts of its feature pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.blocks import checkpointed, to_map
from vitkern.models.pyramid import Classifier, FeatureInfo, some_of
from vitkern.models.resnet import DEPTHS, ResNet
from vitkern.nn import (
    ClusteringTokenizer,
    FilterTokenizer,
    PoolingTokenizer,
    RecurrentTokenizer,
    TokenProjector,
    TokenTransformer,
)

TOKENIZERS = ("filter", "pooling", "clustering")


def tokenizer_of(
    kind: str, channels: int, tokens: int, token_channels: int, backend: str | None
) -> nn.Module:
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if kind == "filter":
        return FilterTokenizer(channels, tokens, token_channels, backend=backend)
    if kind == "pooling":
        return PoolingTokenizer(channels, tokens, token_channels)
    if kind == "clustering":
        return ClusteringTokenizer(channels, tokens, token_channels, backend=backend)
    raise ValueError(f"tokenizer must be one of {TOKENIZERS}, got {kind!r}")


def tokens_of(tokenizer: nn.Module, x: Tensor, previous: Tensor | None, size: Sequence[int]) -> Tensor:
    """The tokens [B, T, CT] that a tokenizer of any kind makes from a map [B, H W, C] of this size."""
    if isinstance(tokenizer, RecurrentTokenizer):
        return tokenizer(x, previous)
    return tokenizer(x) if isinstance(tokenizer, FilterTokenizer) else tokenizer(x, *size)


class VisualTransformer(nn.Module):
    """One module of the paper: tokenizer, transformer and projector."""

    def __init__(
        self, tokenizer: nn.Module, transformer: TokenTransformer, projector: TokenProjector | None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.projector = projector

    def forward(self, x: Tensor, tokens: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns a new map and new tokens [B, T, CT] from a map [B, H W, C] and the previous module's tokens."""
        tokens = self.transformer(tokens_of(self.tokenizer, x, tokens, size))
        return (x if self.projector is None else self.projector(x, tokens)), tokens


class VTResNet(Classifier, ResNet):
    """A ResNet whose last stage is Visual Transformers: images [B, C, H, W] to [B, num_classes].

    Args:
        depth: depth of the ResNet: 18, 34, 50 or 101.
        img_size: accepted for compatibility, without effect: images of all sizes run.
        num_classes: number of classes; 0: the model returns the mean of the tokens, [B, CT].
        tokens, token_channels: number of tokens, and channels of a token.
        map_channels: channels of the projectors' maps; None: 512, or the channels of the ResNet's map if it has more.
        key_channels, hidden_channels: channels of the transformers' keys and of their feed-forward networks; None:
            token_channels, as in the paper's equations.
        projector_channels: channels of the projectors' queries and keys; None: map_channels.
        tokenizer: tokenizer of the first module: "filter", "pooling" or "clustering".
        recurrent: whether later tokenizers are made from the previous tokens; else they are like the first.
        projector: whether modules change the map.
        last_projector: whether the last module does too; its map is unused, so its projector gets no gradient.
        scaled: whether attention is divided by the root of the number of channels.
        value_proj: whether the transformers project the values.
        with_cp: whether backward recomputes the blocks.
        backend: passed on to the token ops.
    """

    def __init__(
        self,
        depth: int,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        tokens: int = 16,
        token_channels: int = 1024,
        map_channels: int | None = None,
        key_channels: int | None = 256,
        hidden_channels: int | None = None,
        projector_channels: int | None = None,
        tokenizer: str = "filter",
        recurrent: bool = True,
        projector: bool = True,
        last_projector: bool = False,
        scaled: bool = False,
        value_proj: bool = False,
        with_cp: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(depth, in_chans, stages=3, with_cp=with_cp)
        if not (projector or recurrent):
            raise ValueError("projector=False needs recurrent=True: only tokens lead to the next module then")
        self.num_classes, self.num_features = num_classes, token_channels
        modules = DEPTHS[depth][3]
        before, after = self.channels[-1], map_channels or max(self.channels[-1], 512)
        self.vt = nn.ModuleList()
        for index in range(modules):
            if recurrent and index:
                made: nn.Module = RecurrentTokenizer(before, token_channels, backend=backend)
            else:
                made = tokenizer_of(tokenizer, before, tokens, token_channels, backend)
            transformer = TokenTransformer(
                token_channels,
                key_channels,
                hidden_channels,
                scaled=scaled,
                value_proj=value_proj,
                backend=backend,
            )
            project = None
            if projector and (last_projector or index < modules - 1):
                widths = (before, token_channels, after, projector_channels or after)
                project, before = TokenProjector(*widths, scaled=scaled, backend=backend), after
            self.vt.append(VisualTransformer(made, transformer, project))
        self.head = self.make_head(num_classes)

    def forward_features(self, image: Tensor) -> Tensor:  # [B, CT]
        x = self.maps(image)[-1]
        state: tuple[Tensor, Any] = (x.flatten(2).transpose(1, 2), None)  # the map and the tokens
        for module in self.vt:
            state = checkpointed(partial(module, size=x.shape[2:]), *state, with_cp=self.with_cp)
        return state[1].mean(1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.forward_features(image))


class SemanticHead(nn.Module):
    """Panoptic FPN's head (arXiv 1901.02446): brings each map to stride 4 in steps of 2, then adds the maps.

    Args:
        channels: channels of the maps at strides 4, 8, 16 and 32.
        width: channels of the convolutions.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(4):
            steps = []
            for step in range(max(level, 1)):
                conv = nn.Conv2d(width if step else channels, width, 3, padding=1, bias=False)
                steps.append(nn.Sequential(conv, nn.GroupNorm(math.gcd(32, width), width), nn.ReLU()))
            self.levels.append(nn.ModuleList(steps))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(
        self, maps: Sequence[Tensor]
    ) -> Tensor:  # four [B, C, H / s, W / s] -> [B, num_classes, H / 4, W / 4]
        sizes = [m.shape[2:] for m in maps]
        total: Tensor | None = None
        for level, (steps, x) in enumerate(zip(self.levels, maps)):
            for step, layer in enumerate(steps.children()):
                x = layer(x)
                if level:
                    x = F.interpolate(x, sizes[level - 1 - step], mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        return self.classifier(total)


class VTFPN(ResNet):
    """A ResNet with VT-FPN and a semantic head: images [B, C, H, W] to logits of the pixels.

    Each stage of the ResNet gives tokens. One transformer relates the tokens of all stages, and projectors add them to
    the maps.

    Args:
        depth: depth of the ResNet: 18, 34, 50 or 101.
        img_size: accepted for compatibility, without effect: images of all sizes run.
        num_classes: number of classes, by default COCO-Stuff's; 0: the model returns the maps, [B, out_channels, h, w].
        tokens, token_channels: number of tokens from each stage, and channels of a token.
        out_channels: channels of the maps.
        key_channels, hidden_channels: channels inside the transformer, as for :class:`VTResNet`.
        projector_channels: channels of the projectors' queries and keys.
        tokenizer: "filter", "pooling" or "clustering".
        head_channels: channels of the head's convolutions.
        out_indices: numbers of the maps to return if num_classes is 0.
        scaled, value_proj, with_cp, backend: as for :class:`VTResNet`.
    """

    def __init__(
        self,
        depth: int,
        *,
        img_size: int = 512,
        in_chans: int = 3,
        num_classes: int = 171,
        tokens: int = 8,
        token_channels: int = 1024,
        out_channels: int = 256,
        key_channels: int | None = 256,
        hidden_channels: int | None = None,
        projector_channels: int | None = 128,
        tokenizer: str = "filter",
        head_channels: int = 128,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        scaled: bool = False,
        value_proj: bool = False,
        with_cp: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(depth, in_chans, with_cp=with_cp)
        self.num_classes, self.out_channels = num_classes, out_channels
        self.out_levels = some_of(4, out_indices)
        self.tokenizers = nn.ModuleList(
            tokenizer_of(tokenizer, channels, tokens, token_channels, backend) for channels in self.channels
        )
        self.transformer = TokenTransformer(
            token_channels,
            key_channels,
            hidden_channels,
            scaled=scaled,
            value_proj=value_proj,
            backend=backend,
        )
        self.projectors = nn.ModuleList(
            TokenProjector(
                channels,
                token_channels,
                out_channels,
                projector_channels or out_channels,
                scaled=scaled,
                backend=backend,
            )
            for channels in self.channels
        )
        self.head = SemanticHead(out_channels, num_classes, head_channels) if num_classes else None

    @property
    def feature_info(self) -> FeatureInfo:
        if self.head is not None:
            raise AttributeError("a segmentor has no feature_info: give num_classes=0")
        return FeatureInfo(
            {"num_chs": self.out_channels, "reduction": 4 << level, "module": f"projectors.{level}"}
            for level in self.out_levels
        )

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """The four maps, [B, out_channels, H / s, W / s]."""
        maps = self.maps(image)
        sizes = [m.shape[2:] for m in maps]
        pixels = [m.flatten(2).transpose(1, 2) for m in maps]
        tokens = [
            tokens_of(tokenizer, x, None, size) for tokenizer, x, size in zip(self.tokenizers, pixels, sizes)
        ]
        related = self.transformer(torch.cat(tokens, dim=1))
        return [
            to_map(projector(x, related), *size) for projector, x, size in zip(self.projectors, pixels, sizes)
        ]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        maps = self.forward_features(image)
        if self.head is None:
            return [maps[level] for level in self.out_levels]
        return F.interpolate(self.head(maps), image.shape[2:], mode="bilinear", align_corners=False)
