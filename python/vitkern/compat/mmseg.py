# SPDX-License-Identifier: Apache-2.0
"""The backbones of ViT-Adapter in mmseg's registry, in the form for segmentation, under their official names.

A config has ``custom_imports = dict(imports=["vitkern.compat.mmseg"])`` and ``backbone=dict(type="ViTAdapter", ...)``.
"""

from __future__ import annotations

from mmseg.registry import MODELS

from vitkern.models import BEiTAdapter, UniPerceiverAdapter, ViTAdapter, ViTBaseline

for _kind in (ViTAdapter, BEiTAdapter, UniPerceiverAdapter, ViTBaseline):
    MODELS.register_module(name=_kind.__name__, module=_kind)
