# SPDX-License-Identifier: Apache-2.0
"""The published sizes of Visual Transformers."""

from __future__ import annotations

from functools import partial

from vitkern.models.registry import register
from vitkern.models.visual_transformer import VTFPN, VTResNet

for _depth in (18, 34, 50, 101):
    register(f"vt_resnet{_depth}", partial(VTResNet, _depth))
for _depth in (50, 101):
    register(f"vt_fpn_resnet{_depth}", partial(VTFPN, _depth), img_size=512, features=dict(num_classes=0))
