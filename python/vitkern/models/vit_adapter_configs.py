# SPDX-License-Identifier: Apache-2.0
"""The published sizes of ViT-Adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vitkern.models.registry import register
from vitkern.models.vit_adapter import BEiTAdapter, UniPerceiverAdapter, ViTAdapter

TINY = dict(embed_dim=192, depth=12, num_heads=3, deform_num_heads=6)
SMALL = dict(embed_dim=384, depth=12, num_heads=6, deform_num_heads=6)
BASE = dict(embed_dim=768, depth=12, num_heads=12, deform_num_heads=12, deform_ratio=0.5)
LARGE = dict(embed_dim=1024, depth=24, num_heads=16, deform_num_heads=16, deform_ratio=0.5)
BEIT = dict(qkv_bias=True, init_values=1e-6)
BEIT_WINDOWS = (14, 14, 14, 14, 14, 56)


def _windows(kind: type[nn.Module], depth: int) -> dict[str, Any]:
    """Windows of the detection form. The last block before each extractor has none, or in BEiT a large one."""
    if kind is BEiTAdapter:
        sizes = [BEIT_WINDOWS[block % len(BEIT_WINDOWS)] for block in range(depth)]
        return {"window_attn": [True] * depth, "window_size": sizes}
    return {"window_attn": [(block + 1) % max(depth // 4, 1) != 0 for block in range(depth)]}


def _builder(kind: type[nn.Module], **config: Any) -> Callable[..., nn.Module]:
    """Returns the function that builds a model from a configuration with overrides, for images of `img_size`."""

    def build(*, img_size: int, **overrides: Any) -> nn.Module:
        options = {**config, "img_size": img_size, "pretrain_size": img_size}
        if overrides.get("variant") == "detection":
            options |= _windows(kind, overrides.get("depth", config["depth"]))
        return kind(**{**options, **overrides})

    return build


for _size, _config, _rate in (
    ("tiny", TINY, 0.1),
    ("small", SMALL, 0.2),
    ("base", BASE, 0.3),
    ("large", LARGE, 0.4),
):
    register(f"vit_adapter_{_size}", _builder(ViTAdapter, drop_path_rate=_rate, **_config), features={})
for _size, _config, _rate in (("base", BASE, 0.2), ("large", LARGE, 0.3)):
    _build = _builder(BEiTAdapter, drop_path_rate=_rate, **BEIT, **_config)
    register(f"beit_adapter_{_size}", _build, img_size=512, features={})
for _size, _config, _rate in (("base", BASE, 0.2), ("large", LARGE, 0.4)):
    _build = _builder(UniPerceiverAdapter, drop_path_rate=_rate, **_config)
    register(f"uniperceiver_adapter_{_size}", _build, features={})
