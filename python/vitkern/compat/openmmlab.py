# SPDX-License-Identifier: Apache-2.0
"""What mmseg's and mmdet's registries are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vitkern.models import (
    BEiTAdapter,
    UniPerceiverAdapter,
    ViTAdapter,
    ViTBaseline,
    create_model,
    list_models,
)


def _with(build: Callable[..., nn.Module], **defaults: Any) -> Callable[..., nn.Module]:
    """A function, which every version of a registry takes."""

    def built(**options: Any) -> nn.Module:
        return build(**{**defaults, **options})

    return built


def register_backbones(registry: Any, variant: str) -> None:
    """The backbones of ViT-Adapter under their official names, and all that return feature maps under this package's.

    Args:
        variant: the form of ViT-Adapter where a config names none.
    """
    for kind in (ViTAdapter, BEiTAdapter, UniPerceiverAdapter):
        registry.register_module(name=kind.__name__, module=_with(kind, variant=variant))
    registry.register_module(name=ViTBaseline.__name__, module=ViTBaseline)
    for name in list_models(maps=True):
        form = {"variant": variant} if "_adapter_" in name else {}
        build = _with(create_model, name=name, features_only=True, **form)
        registry.register_module(name=name, module=build)
