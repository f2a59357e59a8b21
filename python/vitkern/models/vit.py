# SPDX-License-Identifier: Apache-2.0
"""The plain vision transformer inside ViT-Adapter. Loads DeiT, AugReg, MAE and DINOv2 weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.models.blocks import (
    DropPath,
    Layer,
    Mlp,
    PatchEmbed,
    ResBottleneckBlock,
    attend,
    check_blocks,
    check_patch_size,
    checkpointed,
    drop_path_rates,
    head_channels,
    merge_windows,
    position_grid,
    resize_positions,
    split_windows,
    to_map,
    window_sizes,
)


class Attention(nn.Module):
    """Self-attention over all tokens, or inside windows."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        head_channels(channels, num_heads)
        self.num_heads, self.attn_drop, self.window_size = num_heads, attn_drop, window_size
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C]
        dropout_p = self.attn_drop if self.training else 0.0
        qkv = self.qkv(x)
        if self.window_size is None:
            x = attend(qkv, self.num_heads, dropout_p=dropout_p)
        else:
            # The padding is not masked: its keys and values are zero, but it counts in the softmax.
            windows = split_windows(qkv, self.window_size, height, width)
            windows = attend(windows, self.num_heads, dropout_p=dropout_p)
            x = merge_windows(windows, self.window_size, height, width)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
        act_layer: Layer,
        norm_layer: Layer,
        window_size: int | None,
        use_residual: bool,
        layer_scale: bool,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = norm_layer(channels)
        self.attn = Attention(channels, num_heads, qkv_bias, attn_drop, drop, window_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), act_layer, drop)
        # Ones, so that weights published without these factors keep their results.
        self.gamma1 = nn.Parameter(torch.ones(channels)) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.ones(channels)) if layer_scale else None
        self.residual = ResBottleneckBlock(channels, act_layer) if use_residual else None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, H W, C]
        def body(x: Tensor) -> Tensor:
            y = self.attn(self.norm1(x), height, width)
            x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
            y = self.mlp(self.norm2(x))
            x = x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)
            if self.residual is not None:
                x = self.residual(to_map(x, height, width)).flatten(2).transpose(1, 2)
            return x

        return checkpointed(body, x, with_cp=self.with_cp)


class VisionTransformer(nn.Module):
    """Patch and position embeddings and blocks.

    Args:
        img_size: image size of the position embeddings, which are resized for images of other sizes.
        pretrain_size: image size that the position embeddings were trained for, with as many patches as img_size.
        num_classes: accepted for compatibility, without effect: there is no classifier.
        residual_indices: numbers of the blocks that ViTDet's convolutions follow.
        window_attn, window_size: windows of all blocks or of each.
        layer_scale: whether each channel of each branch has a learnable factor.
        with_cp: whether backward recomputes each block.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        residual_indices: Sequence[int] = (),
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: bool = True,
        embed_layer: Layer = PatchEmbed,
        norm_layer: Layer | None = None,
        act_layer: Layer | None = None,
        window_attn: bool | Sequence[bool] = False,
        window_size: int | Sequence[int | None] | None = 14,
        pretrain_size: int | Sequence[int] = 224,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        check_patch_size(patch_size)
        self.embed_dim = self.num_features = embed_dim
        self.in_chans, self.drop_path_rate, self.with_cp = in_chans, drop_path_rate, with_cp
        self.norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)

        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim
        )
        patches: Any = self.patch_embed.num_patches
        self.pretrain_grid = position_grid(patches, img_size, pretrain_size)
        self.cls_token: nn.Parameter | None = None
        # The first is the class token's: checkpoints have it, but it is unused.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)

        check_blocks("residual_indices", residual_indices, depth)
        windows = window_sizes(window_attn, window_size, depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                act_layer=act_layer or nn.GELU,
                norm_layer=self.norm_layer,
                window_size=windows[index],
                use_residual=index in residual_indices,
                layer_scale=layer_scale,
                with_cp=with_cp,
            )
            for index, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )

    def embed(self, image: Tensor) -> tuple[Tensor, int, int]:
        """Tokens [B, H W, D] with their positions, H and W."""
        x, height, width = self.patch_embed(image)
        positions = resize_positions(self.pos_embed[:, 1:], self.pretrain_grid, height, width)
        return self.pos_drop(x + positions), height, width
