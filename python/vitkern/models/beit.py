# SPDX-License-Identifier: Apache-2.0
"""BEiT inside ViT-Adapter, with relative positions. Loads BEiT and BEiTv2 weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.blocks import (
    DropPath,
    Layer,
    Mlp,
    PatchEmbed,
    attend,
    check_patch_size,
    checkpointed,
    drop_path_rates,
    head_channels,
    initialise,
    merge_windows,
    pair,
    per_block,
    position_grid,
    resize_positions,
    split_windows,
    window_sizes,
)
from vitkern.models.relative_positions import RelativePositions


class SharedPositions(RelativePositions):
    """One bias table for all blocks, for checkpoints that share it."""

    def __init__(self, window: tuple[int, int], num_heads: int, with_cls: bool) -> None:
        super().__init__()
        self.add_positions(window, num_heads, with_cls)


class Attention(RelativePositions):
    """Self-attention with position biases; queries and values have a bias, keys have none.

    Args:
        window: (height, width) of the position biases.
        split: whether the map is split into such windows; otherwise the map must be one window.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: tuple[int, int] | None,
        split: bool,
        *,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        with_cls: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_drop, self.window, self.split = num_heads, attn_drop, window, split
        self.scale = qk_scale or head_channels(channels, num_heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(channels)) if qkv_bias else None
        if window is not None:
            self.add_positions(window, num_heads, with_cls)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, (1 +) H W, C]
        if self.window is None:
            return self._attention(x, None)
        bias = self.position_bias()
        if self.split:
            # Padded before the projection: a padding token has a key of zero and the value v_bias.
            size = self.window[0]
            windows = self._attention(split_windows(x, size, height, width), bias)
            return merge_windows(windows, size, height, width)
        if (height, width) != self.window:
            raise ValueError(
                f"the relative positions are those of {self.window[0]} x {self.window[1]} patches, got an image "
                f"of {height} x {width}: an image of {16 * self.window[0]} x {16 * self.window[1]} is needed"
            )
        return self._attention(x, bias)

    def _attention(self, x: Tensor, bias: Tensor | None) -> Tensor:
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        dropout_p = self.attn_drop if self.training else 0.0
        x = attend(qkv, self.num_heads, scale=self.scale, bias=bias, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    def __init__(
        self,
        channels: int,
        attention: Attention,
        *,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm_layer: Layer,
        init_values: float,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = norm_layer(channels)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), drop=drop, drop_hidden=False)
        self.gamma_1 = nn.Parameter(torch.full((channels,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((channels,), init_values))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # [B, (1 +) H W, C]
        def body(x: Tensor) -> Tensor:
            x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), height, width))
            return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))

        return checkpointed(body, x, with_cp=self.with_cp)


def _windows(window_attn: Any, sizes: list[int | None], depth: int) -> list[tuple[Any, bool]]:
    """For each block, the window of its position biases and whether its map is split into such windows."""
    cut = [size is not None for size in window_sizes(window_attn, sizes, depth)]
    return [(None if size is None else (size, size), split) for size, split in zip(sizes, cut)]


class BEiT(nn.Module):
    """Patch embedding and blocks, in two forms.

    With a class token, each block has relative positions over the whole image, whose size is then fixed. Without one,
    each block has them over its window.

    Args:
        img_size: size of all images, with a class token.
        window_attn, window_size: windows of blocks without a class token. Size None: no position biases.
        layer_scale_init: initial factor of each channel of each branch.
        use_abs_pos_emb, pretrain_size: whether to add absolute positions, and the size they were trained for.
        use_rel_pos_bias: whether blocks have position biases, with a class token.
        use_shared_rel_pos_bias: whether the state dict holds a shared table, which has no effect.
        num_classes, use_checkpoint: accepted for compatibility, without effect.
        with_cp: whether backward recomputes each block.
    """

    def __init__(
        self,
        *,
        with_cls: bool,
        img_size: int | Sequence[int] = 512,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 80,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        hybrid_backbone: None = None,
        norm_layer: Layer | None = None,
        layer_scale_init: float = 0.0,
        use_checkpoint: bool = False,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        window_attn: bool | Sequence[bool] = False,
        window_size: int | Sequence[int | None] | None = 14,
        pretrain_size: int | Sequence[int] = 224,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        check_patch_size(patch_size)
        if hybrid_backbone is not None:
            raise ValueError("hybrid_backbone must be None: its tokens form no map that an adapter could use")
        self.embed_dim = self.num_features = embed_dim
        self.in_chans, self.drop_path_rate, self.with_cp = in_chans, drop_path_rate, with_cp
        self.norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        grid, patches = self.patch_embed.grid_size, self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if with_cls else None
        self.pos_embed = None
        if use_abs_pos_emb:
            self.pretrain_grid = position_grid(patches, img_size, pretrain_size)
            self.pos_embed = nn.Parameter(torch.zeros(1, with_cls + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        sizes = per_block(window_size, depth, "window_size")
        self.rel_pos_bias = None
        if use_shared_rel_pos_bias:
            self.rel_pos_bias = SharedPositions(grid if with_cls else pair(sizes[0]), num_heads, with_cls)
        whole = [(grid if use_rel_pos_bias else None, False)] * depth
        windows = whole if with_cls else _windows(window_attn, sizes, depth)
        options = dict[str, Any](qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop_rate)
        attention: Callable[..., Attention] = partial(
            Attention, embed_dim, num_heads, proj_drop=drop_rate, with_cls=with_cls, **options
        )
        block = partial(Block, embed_dim, mlp_ratio=mlp_ratio, drop=drop_rate, norm_layer=self.norm_layer)
        self.blocks = nn.ModuleList(
            block(attention(*window), drop_path=rate, init_values=layer_scale_init, with_cp=with_cp)
            for window, rate in zip(windows, drop_path_rates(drop_path_rate, depth))
        )
        self._initialise_transformer()

    def _initialise_transformer(self) -> None:
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        elif self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)

    def embed(self, image: Tensor) -> tuple[Tensor, int, int]:
        """Tokens [B, H W, D], H and W."""
        x, height, width = self.patch_embed(image)
        if self.pos_embed is not None:
            positions: Any = self.pos_embed if self.cls_token is None else self.pos_embed[:, 1:]
            x = x + resize_positions(positions, self.pretrain_grid, height, width)
        return self.pos_drop(x), height, width
