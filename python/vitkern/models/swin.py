# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer (arXiv 2103.14030) with Microsoft's parameter names. Loads Microsoft's and timm's weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.adaptformer_blocks import joined, reset_adapters
from vitkern.models.blocks import (
    DropPath,
    Layer,
    Mlp,
    PatchEmbed,
    attend,
    checkpointed,
    drop_path_rates,
    head_channels,
    initialise,
    merge_windows,
    pair,
    split_windows,
)
from vitkern.models.pyramid import Classifier
from vitkern.models.relative_positions import RelativePositions
from vitkern.nn import AdapterBottleneck

# Makes a block's adapter, or None, from its channels and number.
AdapterOf = Callable[[int, int], AdapterBottleneck | None]

FAR = -100.0  # bias between tokens of a window that are not neighbours in the map


class WindowAttention(RelativePositions):
    """Self-attention inside windows [B', N, C] with a bias for each distance."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: tuple[int, int],
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.scale = qk_scale or head_channels(channels, num_heads) ** -0.5
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.add_positions(window, num_heads, with_cls=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.position_bias()
        if mask is not None:  # [windows of an image, N, N]
            images = windows.shape[0] // mask.shape[0]
            bias = (bias + mask[:, None]).repeat(images, 1, 1, 1)
        dropout_p = self.attn_drop if self.training else 0.0
        x = attend(self.qkv(windows), self.num_heads, scale=self.scale, bias=bias, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x))


def shifted_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Biases that mask pairs of tokens from opposite sides of a map rolled by `shift`: [windows, N, N]."""

    def side(length: int) -> Tensor:  # 0 before the last window, 1 and 2 in its two parts
        place = torch.arange(length)
        return (place >= length - window).long() + (place >= length - shift).long()

    region = 3 * side(height)[:, None] + side(width)[None, :]
    regions = split_windows(region.flatten()[None, :, None], window, height, width)[..., 0]
    return FAR * (regions[:, :, None] != regions[:, None, :]).float()


class SwinBlock(nn.Module):
    """A block on maps of one size, with windows shifted by `shift`; maps are padded to whole windows."""

    attn_mask: Tensor | None

    def __init__(
        self,
        channels: int,
        resolution: tuple[int, int],
        num_heads: int,
        window: int,
        shift: int,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: Layer,
        adapter: AdapterBottleneck | None,
        sequential: bool,
    ) -> None:
        super().__init__()
        self.resolution, self.sequential, self.with_cp = resolution, sequential, False
        if min(resolution) <= window:
            window, shift = min(resolution), 0
        self.window, self.shift = window, shift
        self.padded = resolution[0] + -resolution[0] % window, resolution[1] + -resolution[1] % window
        self.norm1 = norm_layer(channels)
        self.attn = WindowAttention(
            channels, num_heads, (window, window), qkv_bias, qk_scale, attn_drop, drop
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), drop=drop)
        mask = shifted_mask(*self.padded, window, shift) if shift else None
        self.register_buffer("attn_mask", mask, persistent=False)
        self.adaptmlp = adapter

    def forward(self, x: Tensor) -> Tensor:  # [B, H W, C]
        return checkpointed(self._body, x, with_cp=self.with_cp)

    def _body(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attention(self.norm1(x)))
        return joined(x, self.drop_path(self.mlp(self.norm2(x))), self.adaptmlp, self.sequential)

    def _attention(self, x: Tensor) -> Tensor:
        (height, width), padded = self.resolution, self.padded
        maps = x.unflatten(1, self.resolution)
        maps = F.pad(maps, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        if self.shift:
            maps = maps.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(split_windows(maps.flatten(1, 2), self.window, *padded), self.attn_mask)
        maps = merge_windows(windows, self.window, *padded).unflatten(1, padded)
        if self.shift:
            maps = maps.roll((self.shift, self.shift), (1, 2))
        return maps[:, :height, :width].flatten(1, 2)


class PatchMerging(nn.Module):
    """[B, H W, C] to [B, H/2 W/2, 2 C]."""

    def __init__(self, resolution: tuple[int, int], channels: int, norm_layer: Layer) -> None:
        super().__init__()
        self.resolution = resolution
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = norm_layer(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.resolution
        x = x.unflatten(1, (height // 2, 2, width // 2, 2)).permute(0, 1, 3, 4, 2, 5)  # columns before rows
        return self.reduction(self.norm(x.flatten(3).flatten(1, 2)))


class SwinStage(nn.Module):
    """Blocks on maps of one size, then PatchMerging, except in the last stage."""

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(Classifier):
    """A classifier of images ``[B, C, H, W]`` of `img_size`, a multiple of 8 patches.

    Args:
        window_size: side of a window; a map that is no larger is one window.
        ape: whether to add absolute position embeddings.
        num_classes: number of classes; 0 returns the features.
        use_checkpoint: whether backward recomputes each block.
        adapter, sequential: a function that makes each block's adapter, and whether adapters are sequential.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Layer = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        adapter: AdapterOf = lambda channels, block: None,
        sequential: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads must be of as many stages, got {depths} and {num_heads}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.embed_dim, self.num_features = embed_dim, embed_dim << (len(depths) - 1)
        self._add_patches(img_size, patch_size, norm_layer if patch_norm else None, ape, len(depths))
        self.pos_drop = nn.Dropout(drop_rate)
        numbered_rates = iter(enumerate(drop_path_rates(drop_path_rate, sum(depths))))
        block_of = partial(
            SwinBlock,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
            sequential=sequential,
        )
        (height, width), last = self.patch_embed.grid_size, len(depths) - 1

        def stage(level: int) -> SwinStage:
            channels, resolution = embed_dim << level, (height >> level, width >> level)
            blocks = []
            for place, (number, rate) in zip(range(depths[level]), numbered_rates):
                sizes = (channels, resolution, num_heads[level], window_size, place % 2 * (window_size // 2))
                blocks.append(block_of(*sizes, drop_path=rate, adapter=adapter(channels, number)))
            merging = None if level == last else PatchMerging(resolution, channels, norm_layer)
            return SwinStage(blocks, merging)

        self.layers = nn.ModuleList(stage(level) for level in range(len(depths)))
        self.norm = norm_layer(self.num_features)
        self.head = self.make_head(num_classes)
        for part in (self.layers, self.head):
            part.apply(initialise)
        reset_adapters(self)
        self.set_grad_checkpointing(use_checkpoint)

    def _add_patches(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        norm_layer: Layer | None,
        with_positions: bool,
        stages: int,
    ) -> None:
        multiple = patch_size << (stages - 1)
        if any(side % multiple for side in pair(img_size)):
            raise ValueError(f"img_size must be a multiple of {multiple}, got {img_size}")
        self.patch_embed = PatchEmbed(img_size, patch_size, self.in_chans, self.embed_dim, norm_layer)
        self.absolute_pos_embed = None
        if with_positions:
            positions = torch.zeros(1, self.patch_embed.num_patches, self.embed_dim)
            self.absolute_pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))

    def no_weight_decay(self) -> set[str]:
        tables = {
            name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")
        }
        return super().no_weight_decay() | tables

    def forward_features(self, image: Tensor) -> Tensor:
        """The features before the classifier: [B, D]."""
        self._check_shape(image, (self.in_chans, *self.patch_embed.img_size))
        x, _, _ = self.patch_embed(image)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed
        x = self.pos_drop(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).mean(dim=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.forward_features(image))

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames timm's weights to Microsoft's names. timm merges patches at the start of a stage."""
        tensors = {key.replace("head.fc.", "head."): tensor for key, tensor in tensors.items()}
        merging = re.compile(r"layers\.(\d+)\.downsample\.")
        if not any(key.startswith("layers.0.downsample.") for key in tensors):
            tensors = {
                merging.sub(lambda found: f"layers.{int(found[1]) - 1}.downsample.", key): tensor
                for key, tensor in tensors.items()
            }
        return tensors
