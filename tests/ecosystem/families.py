# SPDX-License-Identifier: Apache-2.0
"""A small model of every family of transformers that has multi-scale deformable attention, and inputs for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.parity.weights import fill, seeded

SIZE = 128  # pixels of a side of the images
MASKED = (
    "deformable_detr",
    "grounding_dino",
    "mm_grounding_dino",
    "lw_detr",
    "rf_detr",
    "mask2former",
    "oneformer",
)
DETR = dict(d_model=32, decoder_ffn_dim=32, decoder_layers=2, num_queries=7)
TRANSFORMER = dict(encoder_ffn_dim=32, encoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
RT_DETR = DETR | dict(
    encoder_hidden_dim=32, encoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_in_channels=[16, 24, 32], decoder_in_channels=[32, 32, 32],
)  # fmt: skip
NO_TIMM = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
PYRAMID = dict(out_features=["stage2", "stage3", "stage4"])
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=1100)


def resnet(library: Any) -> Any:
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    return library.ResNetConfig(**sizes, **PYRAMID)


def rt_detr_resnet(library: Any) -> Any:
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    return library.RTDetrResNetConfig(**sizes, **PYRAMID)


def hgnet(library: Any, first: int = 2) -> Any:
    return library.HGNetV2Config(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24], stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], stage_downsample=[False, True, True, True],
        stage_light_block=[False] * 4, stage_kernel_size=[3] * 4,
        out_features=[f"stage{stage}" for stage in range(first, 5)],
    )  # fmt: skip


def swin(library: Any, **options: Any) -> Any:
    sizes = dict(image_size=SIZE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4)
    return library.SwinConfig(**sizes, **options)


class Family(NamedTuple):
    model: str  # the class
    options: Callable[[Any], dict[str, Any]]  # of its config, given the library


FAMILIES = {
    "deformable_detr": Family(
        "DeformableDetrForObjectDetection",
        lambda library: dict(backbone_config=resnet(library)) | NO_TIMM | DETR | TRANSFORMER,
    ),
    "grounding_dino": Family(
        "GroundingDinoForObjectDetection",
        lambda library: dict(backbone_config=swin(library, out_indices=[2, 3, 4]))
        | dict(text_config=library.BertConfig(**BERT)) | DETR | TRANSFORMER,
    ),
    "mm_grounding_dino": Family(
        "MMGroundingDinoForObjectDetection",
        lambda library: dict(backbone_config=swin(library, out_indices=[2, 3, 4]))
        | dict(text_config=library.BertConfig(**BERT)) | DETR | TRANSFORMER,
    ),
    "omdet_turbo": Family("OmDetTurboForObjectDetection", lambda library: NO_TIMM | dict(
        backbone_config=swin(library, out_indices=[2, 3, 4]),
        apply_layernorm_after_vision_backbone=False, image_size=SIZE, encoder_hidden_dim=48, decoder_hidden_dim=48,
        vision_features_channels=[48, 48, 48], encoder_in_channels=[16, 32, 64], class_embed_dim=32, num_queries=7,
        task_encoder_hidden_dim=32, encoder_dim_feedforward=32, decoder_dim_feedforward=32, decoder_num_layers=2,
        encoder_attention_heads=4, decoder_num_heads=4, text_projection_in_dim=32, text_projection_out_dim=32,
        text_config=library.CLIPTextConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=300,
            bos_token_id=1, eos_token_id=2, projection_dim=32),
    )),
    "rt_detr": Family(
        "RTDetrForObjectDetection", lambda library: RT_DETR | dict(backbone_config=rt_detr_resnet(library))
    ),
    "lw_detr": Family("LwDetrForObjectDetection", lambda library: DETR | dict(
        projector_scale_factors=[1.0, 0.5], group_detr=2,
        decoder_self_attention_heads=4, decoder_cross_attention_heads=4,
        backbone_config=library.LwDetrViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, num_windows=4,
            window_block_indices=[0], out_indices=[1, 3], pretrain_image_size=SIZE),
    )),
    "rf_detr": Family("RfDetrForObjectDetection", lambda library: DETR | dict(
        decoder_self_attention_heads=4, decoder_cross_attention_heads=4, group_detr=2,
        backbone_config=library.RfDetrDinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=16, num_windows=2,
            out_indices=[1, 3]),
    )),
    "pp_doclayout_v2": Family("PPDocLayoutV2ForObjectDetection", lambda library: RT_DETR | dict(
        backbone_config=hgnet(library), num_labels=3, class_thresholds=[0.5] * 3, class_order=list(range(3)),
    )),
    "pp_doclayout_v3": Family("PPDocLayoutV3ForObjectDetection", lambda library: RT_DETR | dict(
        backbone_config=hgnet(library, first=1), x4_feat_dim=8, mask_feature_channels=[16, 16],
    )),
    "pp_doclayout_v4": Family("PPDocLayoutV4ForObjectDetection", lambda library: RT_DETR | dict(
        backbone_config=hgnet(library),
    )),
    "rt_detr_v2": Family(
        "RTDetrV2ForObjectDetection", lambda library: RT_DETR | dict(backbone_config=rt_detr_resnet(library))
    ),
    "d_fine": Family("DFineForObjectDetection", lambda library: RT_DETR | dict(
        backbone_config=hgnet(library), decoder_n_points=[3, 6, 3],
    )),
    "deimv2": Family("Deimv2ForObjectDetection", lambda library: RT_DETR | dict(
        backbone_config=hgnet(library), decoder_n_points=[3, 6, 3],
    )),
    "mask2former": Family("Mask2FormerForUniversalSegmentation", lambda library: dict(
        backbone_config=swin(library, out_features=["stage1", "stage2", "stage3", "stage4"]), num_queries=7,
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=2, decoder_layers=2, num_attention_heads=4, train_num_points=64,
    )),
    "oneformer": Family("OneFormerForUniversalSegmentation", lambda library: dict(
        backbone_config=swin(library, out_features=["stage1", "stage2", "stage3", "stage4"]), num_queries=7,
        conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=2,
        decoder_layers=2, num_attention_heads=4, text_encoder_width=32, text_encoder_num_layers=1,
    )),
}  # fmt: skip


def is_installed(family: str) -> bool:
    return importlib.util.find_spec(f"transformers.models.{family}") is not None


def build(family: str, **options: Any) -> nn.Module:
    import transformers

    name, options_of = FAMILIES[family]
    stem = name.rpartition("For")[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**options_of(transformers) | options)
    return fill(getattr(transformers, name)(config)).eval()


def inputs(family: str) -> dict[str, Any]:
    """Two images, the right quarter of the second one padding if the model takes a mask; and texts."""
    pixels = seeded("pixels", (2, 3, SIZE, SIZE))
    given: dict[str, Any] = dict(pixel_values=pixels)
    mask = torch.ones(2, SIZE, SIZE, dtype=torch.long)
    mask[1, :, SIZE * 3 // 4 :] = 0
    if family in MASKED:
        given["pixel_mask"] = mask
    if family in ("grounding_dino", "mm_grounding_dino"):
        words = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]] * 2)
        given |= dict(input_ids=words, attention_mask=torch.ones_like(words))
    if family == "omdet_turbo":
        classes, tasks = torch.tensor([[5, 6, 299]] * 4), torch.tensor([[7, 8, 299]] * 2)
        given |= dict(
            classes_input_ids=classes, classes_attention_mask=torch.ones_like(classes),
            tasks_input_ids=tasks, tasks_attention_mask=torch.ones_like(tasks),
            classes_structure=torch.tensor([2, 2]),
        )  # fmt: skip
    if family == "oneformer":
        given["task_inputs"] = torch.arange(77).repeat(2, 1)
    return given


def tensors(output: Any) -> dict[str, Tensor]:
    """All floating tensors in the output of a model, by name."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(f"{name}.{key}", each)
        elif isinstance(value, (list, tuple)):
            for index, each in enumerate(value):
                walk(f"{name}.{index}", each)

    walk("", dict(output))
    return found
