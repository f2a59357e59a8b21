# SPDX-License-Identifier: Apache-2.0
"""The backbones for mmseg's and mmdet's registries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vitkern.models import (
    BEiTAdapter,
    UniPerceiverAdapter,
    ViTAdapter,
    ViTAEv2,
    ViTBaseline,
    create_model,
    list_models,
)
from vitkern.models.checkpoints import load_pretrained


def _with(build: Callable[..., nn.Module], **defaults: Any) -> Callable[..., nn.Module]:
    """The constructor with defaults, as a function, which every version of a registry accepts."""

    def built(**options: Any) -> nn.Module:
        return build(**{**defaults, **options})

    return built


def _vitaev2(
    *,
    pretrained: str | None = None,
    init_cfg: dict[str, Any] | None = None,
    load_ema: bool = True,
    frozen_stages: int = -1,
    **options: Any,
) -> nn.Module:
    """The official backbone: by default it returns all maps, and loads the moving averages of published weights."""
    if frozen_stages > 0:
        raise ValueError(
            f"frozen_stages must be -1, got {frozen_stages}: requires_grad_(False) freezes stages"
        )
    model = ViTAEv2(**{"out_indices": (0, 1, 2, 3), **options})
    load_pretrained(model, pretrained, init_cfg, ema=load_ema)
    return model


def register_backbones(registry: Any, variant: str) -> None:
    """Registers backbones under their official names, and all models with feature maps under this package's names.

    Args:
        variant: the default form of ViT-Adapter.
    """
    for kind in (ViTAdapter, BEiTAdapter, UniPerceiverAdapter):
        registry.register_module(name=kind.__name__, module=_with(kind, variant=variant))
    registry.register_module(name="ViTBaseline", module=ViTBaseline)
    registry.register_module(name="ViTAEv2", module=_vitaev2)
    for name in list_models(maps=True):
        form = {"variant": variant} if "_adapter_" in name else {}
        build = _with(create_model, name=name, features_only=True, **form)
        registry.register_module(name=name, module=build)
