# SPDX-License-Identifier: Apache-2.0
"""Models of the ViT-Adapter family, with the parameter names of the original projects."""

from vitkern.models import adaptformer_configs as adaptformer_configs
from vitkern.models import visual_transformer_configs as visual_transformer_configs
from vitkern.models import vit_adapter_configs as vit_adapter_configs
from vitkern.models import vitae_configs as vitae_configs
from vitkern.models.adaptformer import AdaptFormer
from vitkern.models.adaptformer_swin import AdaptFormerSwin
from vitkern.models.adaptformer_video import AdaptFormerVideo
from vitkern.models.add_adapters import (
    adapter_state_dict,
    add_adapters,
    freeze_backbone,
    load_adapter_state_dict,
)
from vitkern.models.checkpoints import load_checkpoint, save_checkpoint
from vitkern.models.heads import FCNHead, Segmentor, UperNet, mask_rcnn_parameters
from vitkern.models.layer_decay import layer_decay_groups
from vitkern.models.registry import create_model, list_models
from vitkern.models.visual_transformer import VTFPN, VTResNet
from vitkern.models.vit_adapter import BEiTAdapter, UniPerceiverAdapter, ViTAdapter
from vitkern.models.vit_baseline import ViTBaseline
from vitkern.models.vitae import ViTAE, ViTAEv2

__all__ = [
    "VTFPN",
    "AdaptFormer",
    "AdaptFormerSwin",
    "AdaptFormerVideo",
    "BEiTAdapter",
    "FCNHead",
    "Segmentor",
    "UniPerceiverAdapter",
    "UperNet",
    "VTResNet",
    "ViTAE",
    "ViTAEv2",
    "ViTAdapter",
    "ViTBaseline",
    "adapter_state_dict",
    "add_adapters",
    "create_model",
    "freeze_backbone",
    "layer_decay_groups",
    "list_models",
    "load_adapter_state_dict",
    "load_checkpoint",
    "mask_rcnn_parameters",
    "save_checkpoint",
]
