# SPDX-License-Identifier: Apache-2.0
"""The layer classes of the census: their places, arguments and calls, and their stand-ins in the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One class of a project."""

    project: str
    source: str  # "name==version" on PyPI, "owner/name@commit" on GitHub
    module: str
    kind: str
    call: str  # of calls.py; "" if the layer cannot be called here
    arguments: dict[str, Any]
    stand_in: str  # of tests/layers_today.py or layers_of_others.py
    unless: str = ""  # why it is not called here


MMCV = "mmcv-lite==2.1.0"
RAGGED = {"num_levels": 3, "num_points": [3, 6, 3]}
DETR, CLASSIC = "deformable_detr", "MSDeformAttn"
OPS = "ops.modules.ms_deform_attn"
PIXEL_DECODER = f"modeling.pixel_decoder.{OPS}"


def _of(project: str, source: str, *classes: tuple[Any, ...]) -> list[Record]:
    return [
        Record(project, source, module, kind, call, arguments, stand_in, *rest)
        for module, kind, call, arguments, stand_in, *rest in classes
    ]


def _classic(
    project: str, source: str, module: str, stand_in: str = CLASSIC, **arguments: Any
) -> list[Record]:
    return _of(project, source, (module, "MSDeformAttn", DETR, arguments, stand_in))


def _bev(project: str, source: str, below: str, *names: str) -> list[Record]:
    """The layers of BEVFormer and of projects that copied them."""
    every = {
        "decoder": ("CustomMSDeformableAttention", "mmcv", "MultiScaleDeformableAttention"),
        "spatial_cross_attention": ("MSDeformableAttention3D", "anchors", "Anchors"),
        "temporal_self_attention": ("TemporalSelfAttention", "temporal", "Temporal"),
    }
    rows = [(f"{below}.{name}", *every[name][:2], {}, every[name][2]) for name in names or every]
    return _of(project, source, *rows)


def _libreyolo() -> list[Record]:
    below, layer = "libreyolo.models", "MSDeformableAttention"
    config = {"config": SimpleNamespace(d_model=256, num_feature_levels=4), "num_heads": 8, "n_points": 4}
    return _of(
        "LibreYOLO",
        "libreyolo==1.6.0",
        (f"{below}.deformable_detr.ms_deform_attn", "MSDeformAttn", DETR, {}, CLASSIC),
        (f"{below}.lwdetr.nn", "MSDeformAttn", DETR, {"n_levels": 1}, "Exported"),
        (f"{below}.rfdetr.transformer", "MSDeformAttn", DETR, {"n_levels": 1, "n_points": 2}, "Channels"),
        (f"{below}.grounding_dino.nn", "GDMSDeformAttn", "transformers", config, CLASSIC),
        (f"{below}.rtdetr.nn", layer, "boxes", {}, "Flat"),
        (f"{below}.rtdetrv2.decoder", layer, "boxes", {"num_levels": 3}, "Levels"),
        (f"{below}.rtdetrv2.obb_decoder", layer, "boxes", {"num_levels": 3}, "Levels"),
        (f"{below}.gtr.decoder", layer, "of_maps", RAGGED, "Maps"),
        (f"{below}.gtr.obb_decoder", "OBBMSDeformableAttention", "oriented_maps", RAGGED, "Maps"),
        (f"{below}.openvocab.ovdeim.decoder", layer, "boxes", RAGGED, "Levels"),
        (f"{below}.deim.decoder", layer, "of_levels", RAGGED, "Levels"),
        (f"{below}.dfine.decoder", layer, "of_levels", RAGGED, "Levels"),
        (f"{below}.ec.decoder", layer, "of_levels", RAGGED, "Levels"),
    )


def _real_time() -> list[Record]:
    layer, levels = "MSDeformableAttention", ("of_levels", RAGGED, "Levels")
    lightly = "lightly_train._task_models.object_detection_components"
    rt_detr = "lyuwenyu/RT-DETR@068dfde65f2667ad6555883c69d73de886518cad"
    deim = "ShihuaHuang95/DEIM@a9aa4adce6b5e97b2a6ca9452bf01b7c35440913"
    deimv2 = "Intellindust-AI-Lab/DEIMv2@0fff8d4dcdc272e6cf2d84be31399db471357941"
    dfine = "Peterande/D-FINE@4a1f73a8bcfac736a88abde9596d87f116d780a7"
    v1, v2 = ("boxes", {}, "Flat"), ("boxes", {"num_levels": 3}, "Levels")
    small = {"n_levels": 1, "n_heads": 16, "n_points": 2}
    return [
        *_of("ultralytics", "ultralytics==8.4.190",
             ("ultralytics.nn.modules.transformer", "MSDeformAttn", "boxes", {"n_levels": 3}, "Flat")),
        *_classic("rfdetr", "rfdetr==1.11.2", f"rfdetr.models.{OPS}", "Exported", **small),
        *_classic("masdetr", "masdetr==0.1.1", f"masdetr.models.{OPS}", "Exported", **small),
        *_classic("LW-DETR", "Atten4Vis/LW-DETR@d5e6e6c4add2d24dafb965ced8b50163c50b9788", f"models.{OPS}",
                  n_levels=1),
        *_of("RT-DETR", rt_detr,
             ("rtdetr_pytorch.src.zoo.rtdetr.rtdetr_decoder", layer, *v1),
             ("rtdetrv2_pytorch.src.zoo.rtdetr.rtdetr_decoder", layer, *v1),
             ("rtdetrv2_pytorch.src.zoo.rtdetr.rtdetrv2_decoder", layer, *v2)),
        *_of("D-FINE", dfine, ("src.zoo.dfine.dfine_decoder", layer, *levels)),
        *_of("DEIM", deim, ("engine.deim.dfine_decoder", layer, *levels),
             ("engine.deim.rtdetrv2_decoder", layer, *v2)),
        *_of("DEIMv2", deimv2, ("engine.deim.dfine_decoder", layer, *levels),
             ("engine.deim.rtdetrv2_decoder", layer, *v2)),
        *_classic("DEIMv2", deimv2, "engine.backbone.ms_deform_attn"),
        *_of("lightly-train", "lightly-train==0.18.0", (f"{lightly}.dfine_decoder", layer, "boxes", RAGGED, "Levels"),
             (f"{lightly}.rtdetrv2_decoder", layer, *v2)),
        *_of("easydetect", "easydetect==0.7.10", ("easydetect.nn.decoder", layer, *levels)),
        *_of("dfine-seg", "dfine-seg==0.6.2", ("dfine_seg.model.arch.dfine_decoder", layer, *levels)),
        *_of("pydfine", "pydfine==0.2.1", ("dfine.backends.native.dfine_decoder", layer, *levels)),
        *_of("trolo", "trolo==0.1.31", ("trolo.models.dfine.dfine_decoder", layer, *levels)),
    ]  # fmt: skip


def _detr() -> list[Record]:
    """Deformable-DETR and its copies."""
    tao, below = (
        "NVIDIA/tao_pytorch_backend@3a8a971b817d9bcffb64bc17359d91f0dce4262e",
        "nvidia_tao_pytorch.cv",
    )
    vnext = "wjf5203/VNext@db338339b3b2a303a463257e042635993c19f173"
    dino, mmcv = "groundingdino.models.GroundingDINO.ms_deform_attn", "MultiScaleDeformableAttention"
    grounding = "IDEA-Research/GroundingDINO@856dde20aee659246248e20734ef9ba5214f5e44"
    detrex = "IDEA-Research/detrex@e244e6c3da3e84566728c52c21fb061d23ce0e2f"
    move = "projects.InstMove.MinVIS_motion.mask2former"
    of_tao = f"{below}.deformable_detr.model.ops"
    tadtr = "xlliu7/TadTR@983ae14bcec8d764c5fc916700f1a5dade403b92"
    return [
        *_classic("Deformable-DETR", "fundamentalvision/Deformable-DETR@11169a60c33333af00a4849f1808023eba96a931",
                  f"models.{OPS}"),
        *_classic("DINO", "IDEA-Research/DINO@faa8520fe9604c23ad65a48bc583550a44c0e3ab", f"models.dino.{OPS}"),
        *_classic("MaskDINO", "IDEA-Research/MaskDINO@3831d8514a3728535ace8d4ecc7d28044c42dd14",
                  f"maskdino.{PIXEL_DECODER}"),
        *_classic("Mask2Former", "facebookresearch/Mask2Former@9b0651c6c1d5b3af2e6da0589b719c514ec0d69a",
                  f"mask2former.{PIXEL_DECODER}"),
        *_classic("OneFormer", "SHI-Labs/OneFormer@4962ef6a96ffb76a76771bfa3e8b3587f209752b",
                  f"oneformer.{PIXEL_DECODER}"),
        *_classic("ViT-Adapter", "czczup/ViT-Adapter@fd64a5190f9f4530e8e5961cc87b2a3ad591190b",
                  f"detection.{OPS}"),
        *_classic("DINOv3", "facebookresearch/dinov3@6876159a11b4df116f30f667f8c9888617df0751",
                  "dinov3.eval.segmentation.models.utils.ms_deform_attn"),
        *_classic("ReferFormer", "wjn922/ReferFormer@06fc218f5d8f04730f81471a15ed89ea7e4d30d8", f"models.{OPS}",
                  "ThreeOutputs"),
        *_classic("VNext IDOL", vnext, f"projects.IDOL.idol.models.{OPS}", "ThreeOutputs"),
        *_classic("VNext SeqFormer", vnext, f"projects.SeqFormer.seqformer.models.{OPS}", "ThreeOutputs"),
        *_classic("VNext InstMove", vnext, f"{move}.{PIXEL_DECODER}"),
        *_classic("DeepSolo", "ViTAE-Transformer/DeepSolo@dbadae995035246bad3376c7a44c015c69e9b313",
                  "DeepSolo.adet.layers.ms_deform_attn"),
        *_classic("TESTR", "mlpc-ucsd/TESTR@f369f138e041d1d27348a1f6600e456452001d23", "adet.layers.ms_deform_attn"),
        *_of("GroundingDINO", grounding, (dino, mmcv, "mmcv", {"batch_first": True}, mmcv)),
        *_of("groundingdino-py", "groundingdino-py==0.4.0", (dino, mmcv, "mmcv", {"batch_first": True}, mmcv)),
        *_of("rf-groundingdino", "rf-groundingdino==0.3.0", (dino, mmcv, "mmcv", {"batch_first": True}, mmcv)),
        *_of("detrex", detrex, ("detrex.layers.multi_scale_deform_attn", mmcv, "mmcv", {}, mmcv)),
        *_of("mmcv", MMCV, ("mmcv.ops.multi_scale_deform_attn", mmcv, "mmcv", {}, mmcv)),
        *_classic("TAO", tao, f"{of_tao}.modules"),
        *_classic("TAO", tao, f"{of_tao}.mask2former_modules"),
        *_of("TAO", tao, (f"{of_tao}.gdino_modules", "GDINOMultiScaleDeformableAttention", "mmcv",
                          {"batch_first": True}, mmcv)),
        *_classic("TAO", tao, f"{below}.odise.{PIXEL_DECODER}"),
        *_of("TadTR", tadtr, ("models.ops.temporal_deform_attn.temporal_deform_attn", "DeformAttn", "segments", {},
                              CLASSIC)),
    ]  # fmt: skip


def _birds_eye() -> list[Record]:
    plugin = "projects.mmdet3d_plugin"
    uniad = "OpenDriveLab/UniAD@dd161b220c22de1c874c3fb8d55979054b24d716"
    maptr = "hustvl/MapTR@a6872d8d9670bde17b4b01560f1221f88b443d55"
    voxformer = "NVlabs/VoxFormer@63da92415447c2e97654bad977254c907f5ce703"
    boxes = "its call takes boxes of mmdet3d and einops"
    motion = f"{plugin}.uniad.dense_heads.motion_head_plugin.motion_deformable_attn"
    return [
        *_bev("BEVFormer", "fundamentalvision/BEVFormer@66b65f3a1f58caf0507cb2a971b9c0e7f842376c",
              f"{plugin}.bevformer.modules"),
        *_bev("UniAD", uniad, f"{plugin}.uniad.modules"),
        *_of("UniAD", uniad, (motion, "MotionDeformableAttention", "", {}, "Temporal", boxes)),
        *_bev("VAD", "hustvl/VAD@1688c4b1c3a9e2e7873ca9700ff8058170c0e3c8", f"{plugin}.VAD.modules"),
        *_bev("MapTR", maptr, f"{plugin}.bevformer.modules"),
        *_of("MapTR", maptr, (f"{plugin}.maptr.modules.geometry_kernel_attention", "GeometryKernelAttention", "", {},
                              "", "it is another operation: it samples fixed kernels of whole pixels")),
        *_of("VoxFormer", voxformer,
             (f"{plugin}.voxformer.modules.deformable_cross_attention", "MSDeformableAttention3D", "anchors", {},
              "Anchors"),
             (f"{plugin}.voxformer.modules.deformable_self_attention", "DeformSelfAttention", "temporal", {},
              "Temporal")),
    ]  # fmt: skip


RECORDS = (*_real_time(), *_libreyolo(), *_detr(), *_birds_eye())
