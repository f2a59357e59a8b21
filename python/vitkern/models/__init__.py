# SPDX-License-Identifier: Apache-2.0
"""Models of the ViT-Adapter family, with the parameter names of the projects they come from."""

from vitkern.models.checkpoints import load_checkpoint, save_checkpoint
from vitkern.models.vit_adapter import BEiTAdapter, UniPerceiverAdapter, ViTAdapter
from vitkern.models.vit_baseline import ViTBaseline

__all__ = [
    "BEiTAdapter",
    "UniPerceiverAdapter",
    "ViTAdapter",
    "ViTBaseline",
    "load_checkpoint",
    "save_checkpoint",
]
