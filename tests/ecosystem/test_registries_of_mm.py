# SPDX-License-Identifier: Apache-2.0
"""This package's backbones in configs, segmentors and detectors of mmseg and mmdet.

With mmcv-lite, which has no compiled ops: nothing here needs deformable convolutions, RoIAlign or non-maximum
suppression.
"""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.helpers import close, image
from tests.parity.weights import fill
from vitkern.models import FCNHead, Segmentor, UperNet, ViTAdapter, load_checkpoint, mask_rcnn_parameters
from vitkern.models.table import count_parameters

Config = pytest.importorskip("mmengine.config").Config
PROJECTS = {"mmseg": "segmentation", "mmdet": "detection"}

# Backbones of the official configurations, word for word but for the file of weights.
COMMON = "patch_size=16, mlp_ratio=4, conv_inplane=64, n_points=4, cffn_ratio=0.25"
QUARTERS = {12: "[[0, 2], [3, 5], [6, 8], [9, 11]]", 24: "[[0, 5], [6, 11], [12, 17], [18, 23]]"}
TINY = f"embed_dim=192, depth=12, num_heads=3, deform_num_heads=6, deform_ratio=1.0, drop_path_rate=0.1, {COMMON}"
LARGE = f"embed_dim=1024, depth=24, num_heads=16, deform_num_heads=16, deform_ratio=0.5, {COMMON}"
BEIT = f"{LARGE}, qkv_bias=True, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=1e-6"
WINDOWS = "window_attn=[True, True, False] * 4, window_size=[14, 14, None] * 4"
OFFICIAL = [
    (
        "mmseg",
        f"type='ViTAdapter', {TINY}, interaction_indexes={QUARTERS[12]}, window_attn=[False] * 12, "
        "window_size=[None] * 12",
        7_966_640,
    ),
    (
        "mmseg",
        f"type='BEiTAdapter', img_size=640, {BEIT}, drop_path_rate=0.3, with_cp=True, "
        f"interaction_indexes={QUARTERS[24]}",
        328_756_928,
    ),
    (
        "mmseg",
        f"type='UniPerceiverAdapter', {LARGE}, drop_path_rate=0.4, with_cp=True, interaction_indexes={QUARTERS[24]}, "
        "window_attn=[False] * 24, window_size=[None] * 24",
        326_593_728,
    ),
    ("mmdet", f"type='ViTAdapter', {TINY}, interaction_indexes={QUARTERS[12]}, {WINDOWS}", 7_966_640),
    (
        "mmdet",
        f"type='BEiTAdapter', img_size=224, {BEIT}, drop_path_rate=0.4, interaction_indexes={QUARTERS[24]}, "
        "version='old', window_attn=[True] * 24, window_size=[14, 14, 14, 14, 14, 56] * 4",
        327_380_032,
    ),
    (
        "mmdet",
        "type='ViTBaseline', patch_size=16, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4, drop_path_rate=0.1, "
        f"out_indices=[2, 5, 8, 11], {WINDOWS}",
        5_973_312,
    ),
    (
        "mmdet",
        "type='ViTAEv2', RC_tokens_type=['window', 'window', 'transformer', 'transformer'], stages=4, "
        "NC_tokens_type=['window', 'window', 'transformer', 'transformer'], embed_dims=[64, 64, 128, 256], "
        "token_dims=[64, 128, 256, 512], downsample_ratios=[4, 2, 2, 2], NC_depth=[2, 2, 8, 2], "
        "NC_heads=[1, 2, 4, 8], RC_heads=[1, 1, 2, 4], mlp_ratio=4., NC_group=[1, 32, 64, 128], "
        "RC_group=[1, 16, 32, 64], out_indices=[0, 1, 2, 3], drop_rate=0., attn_drop_rate=0., drop_path_rate=0.2, "
        "window_size=7, use_checkpoint=False, load_ema=True",
        19_355_688 - 512 * 1000 - 1000,
    ),
    ("mmseg", "type='vitaev2_s'", 19_355_688 - 512 * 1000 - 1000),
    ("mmdet", "type='vit_adapter_small', out_indices=(1, -1)", 27_503_888),
]


def registry(project):
    """The project's registry of models, including ours; names are looked up in its registries first from now on."""
    models = pytest.importorskip(f"{project}.registry").MODELS
    import_module("mmengine.registry").init_default_scope(project)
    return models


def config_of(project, path, backbone):
    path.write_text(
        f"custom_imports = dict(imports=['vitkern.compat.{project}'], allow_failed_imports=False)\n"
        f"model = dict(backbone=dict({backbone}))\n"
    )
    return Config.fromfile(path)


def published(project, file):
    """A configuration file from the project's release."""
    folder = Path(import_module(project).__file__).parent / ".mim/configs"
    return Config.fromfile(folder / file).model


@pytest.mark.parametrize("project, backbone, count", OFFICIAL)
def test_a_config_builds_the_backbone(project, backbone, count, tmp_path):
    models = registry(project)
    config = config_of(project, tmp_path / "config.py", backbone)
    with torch.device("meta"):
        model = models.build(config.model.backbone)
    assert count_parameters(model) == count
    assert getattr(model, "variant", PROJECTS[project]) == PROJECTS[project]
    assert model.feature_info.reduction() == ([8, 32] if "out_indices=(" in backbone else [4, 8, 16, 32])


def test_a_config_may_name_the_other_form_and_a_file_of_weights(tmp_path):
    small = "type='ViTAdapter', embed_dim=48, depth=4, num_heads=3, conv_inplane=8"
    torch.save({"state_dict": {"backbone.level_embed": torch.ones(3, 48)}}, tmp_path / "weights.pth")
    weights = f"init_cfg=dict(type='Pretrained', checkpoint='{tmp_path / 'weights.pth'}')"
    config = config_of("mmseg", tmp_path / "config.py", f"{small}, variant='detection', {weights}")
    model = registry("mmseg").build(config.model.backbone)
    assert model.variant == "detection" and (model.level_embed == 1).all()


BACKBONE = dict(type="ViTAdapter", embed_dim=48, depth=4, num_heads=3, conv_inplane=8)


def segmentor():
    """mmseg's own configuration of UperNet with an auxiliary head, on a small ViT-Adapter."""
    import_module("vitkern.compat.mmseg")
    config = published("mmseg", "_base_/models/upernet_r50.py")
    config.backbone, config.pretrained = dict(BACKBONE), None
    config.data_preprocessor.update(size=(64, 96), test_cfg=dict(size_divisor=32))
    config.decode_head.update(in_channels=[48] * 4, channels=16, num_classes=5)
    config.auxiliary_head.update(in_channels=48, channels=8, num_classes=5)
    for head in (config.decode_head, config.auxiliary_head):
        head.norm_cfg = dict(type="BN", requires_grad=True)
    return fill(registry("mmseg").build(config))


def test_a_segmentor_of_mmseg_computes_the_same_here():
    theirs = segmentor().eval()
    ours = Segmentor(
        ViTAdapter(**{k: v for k, v in BACKBONE.items() if k != "type"}),
        UperNet([48] * 4, 5, channels=16),
        FCNHead(48, 5, channels=8),
    )
    assert load_checkpoint(ours, {"state_dict": theirs.state_dict()}, strict=True) == ([], [])
    with torch.no_grad():
        logits = theirs.encode_decode(image(64, 96), [dict(img_shape=(64, 96))] * 2)
        close(ours.eval()(image(64, 96)), logits)


def test_a_segmentor_of_mmseg_trains():
    structures = pytest.importorskip("mmseg.structures")
    pixel_data = import_module("mmengine.structures").PixelData
    samples = []
    for index in range(2):
        sample = structures.SegDataSample(metainfo=dict(img_shape=(64, 96)))
        sample.gt_sem_seg = pixel_data(data=(torch.arange(64 * 96).view(1, 64, 96) // 7 + index) % 5)
        samples.append(sample)
    model = segmentor().train()
    losses = model.loss(image(64, 96), samples)
    sum(loss for name, loss in losses.items() if "loss" in name).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_detector_of_mmdet_trains():
    """ATSS needs no RoIAlign and, in training, no non-maximum suppression."""
    structures = pytest.importorskip("mmdet.structures")
    instance_data = import_module("mmengine.structures").InstanceData
    models = registry("mmdet")
    import_module("vitkern.compat.mmdet")
    config = published("mmdet", "atss/atss_r50_fpn_1x_coco.py")
    config.backbone = dict(BACKBONE, window_attn=[True, False] * 2, window_size=[3, None] * 2)
    config.neck.update(in_channels=[48] * 4, out_channels=32)
    config.bbox_head.update(in_channels=32, feat_channels=32, stacked_convs=1, num_classes=3)
    model = models.build(config).train()
    samples = []
    for index in range(2):
        sample = structures.DetDataSample(
            metainfo=dict(img_shape=(64, 96), pad_shape=(64, 96), batch_input_shape=(64, 96))
        )
        boxes = torch.tensor([[8.0, 8, 40, 40], [30, 10, 90, 60]])
        sample.gt_instances = instance_data(bboxes=boxes, labels=torch.tensor([index, 2]))
        samples.append(sample)
    assert model.backbone.variant == "detection"
    losses = model.loss(image(64, 96), samples)
    total = sum(torch.stack(list(loss)).sum() if isinstance(loss, list) else loss for loss in losses.values())
    total.backward()
    assert total.isfinite()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    # ATSS leaves the map at stride 4 out.
    of_stride_4 = ("backbone.spm.fc1.", "backbone.up.", "backbone.norm1.")
    assert all(name.startswith(of_stride_4) for name in missing)


@pytest.mark.parametrize("size, count", [("tiny", 28_068_512), ("base", 120_187_088)])
def test_mask_rcnn_of_mmdet_has_the_parameters_of_the_formula(size, count):
    models = registry("mmdet")
    import_module("vitkern.compat.mmdet")
    config = published("mmdet", "_base_/models/mask-rcnn_r50_fpn.py")
    config.backbone = dict(type=f"vit_adapter_{size}")
    with torch.device("meta"):
        config.neck.in_channels = models.build(config.backbone).feature_info.channels()
        model = models.build(config)
    assert count_parameters(model) == mask_rcnn_parameters(model.backbone) == count
