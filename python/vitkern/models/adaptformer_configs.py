# SPDX-License-Identifier: Apache-2.0
"""The published sizes of AdaptFormer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vitkern.models.adaptformer import AdaptFormer
from vitkern.models.adaptformer_swin import AdaptFormerSwin
from vitkern.models.adaptformer_video import AdaptFormerVideo
from vitkern.models.registry import register

BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, qkv_bias=True)
SWIN_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
TUNING = dict(ffn_adapt=True, ffn_option="parallel", ffn_adapter_scalar="0.1")


def _builder(kind: Callable[..., nn.Module], **config: Any) -> Callable[..., nn.Module]:
    def build(**overrides: Any) -> nn.Module:
        return kind(**{**config, **overrides})

    return build


register("adaptformer_vit_base", _builder(AdaptFormer, tuning_config={**TUNING, "ffn_num": 64}, **BASE))
register(
    "adaptformer_video_vit_base",
    _builder(
        AdaptFormerVideo, tuning_config={**TUNING, "ffn_num": 64}, all_frames=8, init_scale=0.001, **BASE
    ),
)
register("adaptformer_swin_base", _builder(AdaptFormerSwin, tuning_config=TUNING, **SWIN_BASE))
