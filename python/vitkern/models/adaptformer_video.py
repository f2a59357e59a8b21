# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer for videos, on VideoMAE's transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.adaptformer_blocks import TunedTransformer, Tuning, reset_adapters
from vitkern.models.blocks import Layer, attend_to, head_channels, initialise, pair, sinusoid_positions


class Attention(nn.Module):
    """Self-attention with separate projections for queries, keys and values; keys have no bias."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.scale = qk_scale or head_channels(channels, num_heads) ** -0.5
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(channels)) if qkv_bias else None
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        query = F.linear(x, self.q_proj.weight, self.q_bias)
        value = F.linear(x, self.v_proj.weight, self.v_bias)
        dropout_p = self.attn_drop if self.training else 0.0
        x = attend_to(query, self.k_proj(x), value, self.num_heads, scale=self.scale, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x))


class TubeletEmbed(nn.Module):
    """Video [B, C, T, H, W] to tokens [B, N, D], one for each patch of `tubelet_size` frames."""

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        frames: int,
        tubelet_size: int,
    ) -> None:
        super().__init__()
        if frames < tubelet_size:
            raise ValueError(f"all_frames must be at least tubelet_size={tubelet_size}, got {frames}")
        self.img_size, self.patch_size, self.tubelet_size = pair(img_size), pair(patch_size), tubelet_size
        grid = self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]
        self.num_patches = grid[0] * grid[1] * (frames // tubelet_size)
        tubelet = (tubelet_size, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, tubelet, tubelet)

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)


class AdaptFormerVideo(TunedTransformer):
    """A vision transformer for videos ``[B, C, T, H, W]`` of `all_frames` and `img_size`, with adapters, prompts or
    neither.

    A new model is not frozen: call :func:`vitkern.models.freeze_backbone`.

    Args:
        num_classes: number of classes; 0 returns the features.
        init_values: accepted for compatibility, without effect.
        use_learnable_pos_emb: position embeddings instead of sines and cosines; they come from a checkpoint and, as
            in the official code, get no gradient.
        init_scale: factor of the classifier's initial weights.
        all_frames, tubelet_size: frames of a video and of a token.
        use_mean_pooling: must be true.
        tuning_config: a dict, Namespace or object with attributes of
            :class:`~vitkern.models.adaptformer_blocks.Tuning`; None: a plain transformer.
        adapter_dropout: dropout of the adapters' hidden units; None: `drop_rate`.
        official_init: draws the adapters' first weights as the official code does, against its paper: a new adapter
            then changes what the transformer computes.
        head_norm: whether the official runs' BatchNorm1d stands before the classifier.
        backend: passed on to :func:`vitkern.adapter_bottleneck`.
    """

    always_trained = ("fc_norm", "head")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer | None = None,
        init_values: float = 0.0,
        use_learnable_pos_emb: bool = False,
        init_scale: float = 0.0,
        all_frames: int = 16,
        tubelet_size: int = 2,
        use_mean_pooling: bool = True,
        tuning_config: Any = None,
        *,
        adapter_dropout: float | None = None,
        official_init: bool = False,
        head_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not use_mean_pooling:
            raise ValueError("use_mean_pooling must be True: there is no class token to classify instead")
        self.num_classes, self.in_chans, self.head_norm = num_classes, in_chans, head_norm
        self.embed_dim = self.num_features = embed_dim
        self.all_frames = all_frames
        self.patch_embed = TubeletEmbed(img_size, patch_size, in_chans, embed_dim, all_frames, tubelet_size)
        patches = self.patch_embed.num_patches
        if use_learnable_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, patches, embed_dim))
        else:
            self.register_buffer("pos_embed", sinusoid_positions(patches, embed_dim), persistent=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self._add_blocks(
            Tuning.of(tuning_config),
            lambda: Attention(embed_dim, num_heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate),
            depth=depth,
            mlp_ratio=mlp_ratio,
            drop=drop_rate,
            drop_hidden=0.0,
            drop_path_rate=drop_path_rate,
            act_layer=nn.GELU,
            norm_layer=norm_layer,
            adapter_dropout=drop_rate if adapter_dropout is None else adapter_dropout,
            backend=backend,
        )
        self.fc_norm = self.norm_layer(embed_dim)
        self.head = self.make_head(num_classes)
        self._initialise(init_scale, official_init)
        self._add_prompts()

    @torch.no_grad()
    def _initialise(self, init_scale: float, official_init: bool) -> None:
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)
        for parameter in self.head.parameters():
            parameter.mul_(init_scale)
        if not official_init:
            reset_adapters(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one video: [C, T, H, W]."""
        return (self.in_chans, self.all_frames, *self.patch_embed.img_size)

    def forward_features(self, video: Tensor) -> Tensor:
        """The features before the classifier: [B, D]."""
        self._check_shape(video, self.input_shape)
        x = self._through_blocks(self.pos_drop(self.patch_embed(video) + self.pos_embed.detach()))
        return self.fc_norm(x.mean(dim=1))

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.forward_features(video))

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        translated = super().translate(tensors)
        positions = translated.get("pos_embed")
        if positions is not None and positions.shape != self.pos_embed.shape:
            raise ValueError(
                f"pos_embed is {list(positions.shape)} in the checkpoint and {list(self.pos_embed.shape)} in "
                "AdaptFormerVideo: the learned positions of a video are not resized"
            )
        return translated
