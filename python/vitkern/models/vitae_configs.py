# SPDX-License-Identifier: Apache-2.0
"""The published sizes of ViTAE and ViTAEv2."""

from __future__ import annotations

from functools import partial
from typing import Any

from vitkern.models.registry import register
from vitkern.models.vitae import ViTAE, ViTAEv2


def _large(channels: int, depth: int, heads: int) -> dict[str, Any]:
    """The models pre-trained as masked autoencoders: one cell of patches and no further reduction."""
    return dict(
        embed_dims=channels,
        token_dims=[channels] * 3,
        downsample_ratios=[16, 1, 1],
        RC_tokens_type=["embedding", "none", "none"],
        NC_tokens_type="transformer_shallow",
        NC_depth=[0, 0, depth],
        NC_heads=[1, 1, heads],
        NC_group=[1, 1, channels // 4],
        mlp_ratio=4.0,
        class_token=True,
    )


VITAE: dict[str, dict[str, Any]] = {
    "tiny": {},
    "6m": dict(NC_depth=[0, 0, 10]),
    "13m": dict(embed_dims=[64, 64, 160], token_dims=[64, 64, 320], NC_depth=[0, 0, 11], NC_heads=[1, 1, 5]),
    "small": dict(
        embed_dims=[64, 64, 192],
        token_dims=[96, 192, 384],
        NC_depth=[0, 0, 14],
        NC_heads=[1, 1, 6],
        NC_group=[1, 1, 96],
        mlp_ratio=3.0,
    ),
    "base": _large(768, 12, 12),
    "large": _large(1024, 24, 16),
    "huge": _large(1280, 32, 16),
}
VITAE_V2: dict[str, dict[str, Any]] = {
    "s": {},
    "48m": dict(embed_dims=[64, 64, 192, 384], token_dims=[96, 192, 384, 768], NC_depth=[2, 2, 11, 2]),
    "b": dict(
        embed_dims=[96, 96, 256, 512],
        token_dims=[128, 256, 512, 1024],
        NC_depth=[2, 2, 12, 2],
        NC_heads=[1, 4, 8, 16],
        RC_heads=[1, 1, 4, 8],
    ),
}

for _size, _config in VITAE.items():
    register(f"vitae_{_size}", partial(ViTAE, **_config))
for _size, _config in VITAE_V2.items():
    register(f"vitaev2_{_size}", partial(ViTAEv2, **_config), features=dict(out_indices=(0, 1, 2, 3)))
