# SPDX-License-Identifier: Apache-2.0
"""Uni-Perceiver's encoder inside ViT-Adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkern.models.blocks import (
    DropPath,
    Layer,
    attend,
    check_patch_size,
    checkpointed,
    drop_path_rates,
    head_channels,
    merge_windows,
    pair,
    resize_positions,
    split_windows,
    window_sizes,
)


class Attention(nn.Module):
    """Self-attention over all tokens, or inside windows."""

    def __init__(self, channels: int, num_heads: int, window_size: int | None = None) -> None:
        super().__init__()
        head_channels(channels, num_heads)
        self.num_heads, self.window_size = num_heads, window_size
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C]
        if self.window_size is None:
            return self.out_proj(attend(self.in_proj(x), self.num_heads))
        # Padded before the projection: keys and values of the padding are the biases.
        windows = split_windows(x, self.window_size, height, width)
        windows = attend(self.in_proj(windows), self.num_heads)
        return self.out_proj(merge_windows(windows, self.window_size, height, width))


class BertLayer(nn.Module):
    """A block whose layer-scale factors start at zero and are applied outside of stochastic depth."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        num_heads: int,
        drop_path: float,
        window_size: int | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.self_attn = Attention(channels, num_heads, window_size)
        self.linear1 = nn.Linear(channels, hidden)
        self.act_fn = nn.GELU()
        self.linear2 = nn.Linear(hidden, channels)
        self.drop_path = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.gamma_1 = nn.Parameter(torch.zeros(channels))
        self.gamma_2 = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C]
        def body(x: Tensor) -> Tensor:
            x = x + self.gamma_1 * self.drop_path(self.self_attn(self.norm1(x), height, width))
            hidden = self.act_fn(self.linear1(self.norm2(x)))
            return x + self.gamma_2 * self.drop_path(self.linear2(hidden))

        return checkpointed(body, x, with_cp=self.with_cp)


class VideoPatchEmbed(nn.Module):
    """Patch embedding with positions in space and the first frame's position in time."""

    def __init__(self, img_size: int | Sequence[int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        height, width = pair(img_size)
        self.grid_size = height // patch_size, width // patch_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.spatial_pos_embed = nn.Embedding(self.num_patches, embed_dim)
        self.temporal_pos_embed = nn.Embedding(8, embed_dim)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(image)
        height, width = x.shape[2], x.shape[3]
        positions = resize_positions(self.spatial_pos_embed.weight[None], self.grid_size, height, width)
        return x.flatten(2).transpose(1, 2) + positions + self.temporal_pos_embed.weight[0], height, width


class VisualEmbed(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, patch_size: int, image_size: int | Sequence[int]) -> None:
        super().__init__()
        self.embeddings_norm = nn.LayerNorm(out_dim)
        self.patch_embed = VideoPatchEmbed(image_size, patch_size, in_dim, out_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        x, height, width = self.patch_embed(image)
        return self.embeddings_norm(x), height, width


class UnifiedBertEncoder(nn.Module):
    """Patch embedding and layers.

    Args:
        img_size: image size of the position embeddings, which are resized for images of other sizes.
        num_classes, pretrain_size: accepted for compatibility, without effect.
        window_attn, window_size: windows of all layers or of each.
        with_cp: whether backward recomputes each layer.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 80,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer | None = None,
        embed_layer: Layer = VisualEmbed,
        window_attn: bool | Sequence[bool] = False,
        window_size: int | Sequence[int | None] | None = 14,
        pretrain_size: int | Sequence[int] = 224,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        check_patch_size(patch_size)
        self.embed_dim = self.num_features = embed_dim
        self.in_chans, self.drop_path_rate, self.with_cp = in_chans, drop_path_rate, with_cp
        self.norm_layer = norm_layer or nn.LayerNorm
        self.cls_token: nn.Parameter | None = None
        windows = window_sizes(window_attn, window_size, depth)
        self.layers = nn.ModuleList(
            BertLayer(embed_dim, int(embed_dim * mlp_ratio), num_heads, rate, windows[index], with_cp)
            for index, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )
        self.visual_embed = embed_layer(
            in_dim=in_chans, out_dim=embed_dim, patch_size=patch_size, image_size=img_size
        )

    def embed(self, image: Tensor) -> tuple[Tensor, int, int]:
        """Tokens [B, H W, D] with their positions, H and W."""
        return self.visual_embed(image)
