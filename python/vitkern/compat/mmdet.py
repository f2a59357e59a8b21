# SPDX-License-Identifier: Apache-2.0
"""This package's backbones in mmdet's registry, those of ViT-Adapter in the form for detection.

A config has ``custom_imports = dict(imports=["vitkern.compat.mmdet"])`` and ``backbone=dict(type="ViTAdapter", ...)``
with the official arguments, or ``backbone=dict(type="vitaev2_s")`` with a name of :func:`vitkern.list_models`.
"""

from mmdet.registry import MODELS

from vitkern.compat.openmmlab import register_backbones

register_backbones(MODELS, "detection")
