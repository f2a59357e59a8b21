# SPDX-License-Identifier: Apache-2.0
"""The backbones of ViT-Adapter in mmdet's registry, in the form for detection, under their official names.

A config has ``custom_imports = dict(imports=["vitkern.compat.mmdet"])`` and ``backbone=dict(type="ViTAdapter", ...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdet.registry import MODELS
from torch import nn

from vitkern.models import BEiTAdapter, UniPerceiverAdapter, ViTAdapter, ViTBaseline


def _detection_form(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        return kind(**{"variant": "detection", **options})

    return build


for _kind in (ViTAdapter, BEiTAdapter, UniPerceiverAdapter):
    MODELS.register_module(name=_kind.__name__, module=_detection_form(_kind))
MODELS.register_module(name=ViTBaseline.__name__, module=ViTBaseline)
