# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer (arXiv 2205.13535): a frozen transformer with small trainable adapters beside its feed-forward networks.

Parameters and results are those of the official code. Adapters run on this package's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.models.adaptformer_blocks import TunedTransformer, Tuning
from vitkern.models.blocks import Layer, PatchEmbed, attend_to, head_channels


class Attention(nn.Module):
    """Self-attention with separate projections for queries, keys and values."""

    def __init__(
        self, channels: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float
    ) -> None:
        super().__init__()
        head_channels(channels, num_heads)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q_proj = nn.Linear(channels, channels, bias=qkv_bias)
        self.v_proj = nn.Linear(channels, channels, bias=qkv_bias)
        self.k_proj = nn.Linear(channels, channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        dropout_p = self.attn_drop if self.training else 0.0
        x = attend_to(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x))


class AdaptFormer(TunedTransformer):
    """A vision transformer for images ``[B, C, H, W]`` of `img_size`, with adapters, prompts or neither.

    A new model is not frozen: call :func:`vitkern.models.freeze_backbone`.

    Args:
        global_pool: whether to classify the mean of the patches instead of the class token.
        num_classes: number of classes; 0 returns the features.
        representation_size: size of a layer that is in the state dict but unused, as in the official code.
        distilled, weight_init: accepted for compatibility; there is no distillation token.
        tuning_config: a dict, Namespace or object with attributes of
            :class:`~vitkern.models.adaptformer_blocks.Tuning`; None: a plain transformer.
        adapter_dropout: dropout of the adapters' hidden units.
        head_norm: whether the official runs' BatchNorm1d stands before the classifier.
        backend: passed on to :func:`vitkern.adapter_bottleneck`.
    """

    def __init__(
        self,
        global_pool: bool = False,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        representation_size: int | None = None,
        distilled: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_layer: Layer = PatchEmbed,
        norm_layer: Layer | None = None,
        act_layer: Layer | None = None,
        weight_init: str = "",
        tuning_config: Any = None,
        *,
        adapter_dropout: float = 0.1,
        head_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if distilled:
            raise ValueError("distilled must be False: AdaptFormer does not use a distillation token")
        if representation_size not in (None, 0, embed_dim):
            raise ValueError(
                f"representation_size must be None or embed_dim={embed_dim}, got {representation_size}"
            )
        self.num_classes, self.in_chans, self.head_norm = num_classes, in_chans, head_norm
        self.embed_dim = self.num_features = embed_dim
        self.global_pool = global_pool
        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim
        )
        patches: Any = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self._add_blocks(
            Tuning.of(tuning_config),
            lambda: Attention(embed_dim, num_heads, qkv_bias, attn_drop_rate, drop_rate),
            depth=depth,
            mlp_ratio=mlp_ratio,
            drop=drop_rate,
            drop_hidden=drop_rate,
            drop_path_rate=drop_path_rate,
            act_layer=act_layer or nn.GELU,
            norm_layer=norm_layer,
            adapter_dropout=adapter_dropout,
            backend=backend,
        )
        self._add_classifier(bool(representation_size))
        self._add_prompts()

    def _add_classifier(self, with_pre_logits: bool) -> None:
        """Adds the layers in the official order: the initial weights are drawn in it."""
        if not self.global_pool:
            self.norm = self.norm_layer(self.embed_dim)
        if with_pre_logits:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(self.embed_dim, self.embed_dim))
        self.head = self.make_head(self.num_classes)
        if self.global_pool:
            self.fc_norm = self.norm_layer(self.embed_dim)

    def forward_features(self, image: Tensor) -> Tensor:
        """The features before the classifier: [B, D]."""
        height, width = self.patch_embed.img_size  # type: ignore[misc]
        self._check_shape(image, (self.in_chans, height, width))
        embedded = self.patch_embed(image)
        x = embedded[0] if isinstance(embedded, tuple) else embedded
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self._through_blocks(self.pos_drop(x + self.pos_embed))
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.forward_features(image))
