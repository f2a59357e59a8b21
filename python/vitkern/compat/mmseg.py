# SPDX-License-Identifier: Apache-2.0
"""This package's backbones in mmseg's registry, those of ViT-Adapter in the form for segmentation.

A config has ``custom_imports = dict(imports=["vitkern.compat.mmseg"])`` and ``backbone=dict(type="ViTAdapter", ...)``
with the official arguments, or ``backbone=dict(type="vitaev2_s")`` with a name of :func:`vitkern.list_models`.
"""

from mmseg.registry import MODELS

from vitkern.compat.openmmlab import register_backbones

register_backbones(MODELS, "segmentation")
