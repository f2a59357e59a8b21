# SPDX-License-Identifier: Apache-2.0
"""Heads: the sizes of the published systems, mmseg's parameter names, and the results."""

import pytest
import torch
from torch.nn import functional as F

import vitkern
from tests.helpers import close, image
from tests.parity.weights import fill, seeded
from vitkern.models import (
    FCNHead,
    Segmentor,
    UperNet,
    ViTAdapter,
    add_adapters,
    freeze_backbone,
    load_checkpoint,
    mask_rcnn_parameters,
)
from vitkern.models.heads import resize
from vitkern.models.table import count_parameters

SMALL = dict(embed_dim=48, depth=4, num_heads=3, conv_inplane=8)
WIDTHS = (6, 8, 10, 12)


def segmentor(auxiliary=True, **options):
    backbone = ViTAdapter(**SMALL, **options)
    channels = backbone.feature_info.channels()
    head = UperNet(channels, 5, channels=16)
    return fill(Segmentor(backbone, head, FCNHead(channels[2], 5, channels=8) if auxiliary else None))


def pyramid(batch=2, size=32):
    return [seeded(str(c), (batch, c, size >> level, size >> level)) for level, c in enumerate(WIDTHS)]


@pytest.mark.parametrize(
    "size, img_size, expected",
    [
        ("tiny", 224, 36_062_428),
        ("small", 224, 57_614_908),
        ("base", 224, 133_636_876),
        ("large", 384, 363_802_092),
    ],
)
def test_segmentors_have_the_published_sizes(size, img_size, expected):
    with torch.device("meta"):
        backbone = vitkern.create_model(f"vit_adapter_{size}", img_size=img_size)
        channels = backbone.feature_info.channels()
        model = Segmentor(backbone, UperNet(channels, 150), FCNHead(channels[2], 150))
    assert count_parameters(model) == expected


@pytest.mark.parametrize(
    "size, img_size, expected",
    [
        ("tiny", 224, 28_068_512),
        ("small", 224, 47_802_368),
        ("base", 224, 120_187_088),
        ("large", 384, 347_927_472),
    ],
)
def test_detectors_have_the_published_sizes(size, img_size, expected):
    with torch.device("meta"):
        backbone = vitkern.create_model(f"vit_adapter_{size}", variant="detection", img_size=img_size)
    assert mask_rcnn_parameters(backbone) == expected


def norm(prefix, channels):
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.bn.{name}": (channels,) for name in names} | {f"{prefix}.bn.num_batches_tracked": ()}


def conv(prefix, inputs, outputs, kernel):
    return {f"{prefix}.conv.weight": (outputs, inputs, kernel, kernel), **norm(prefix, outputs)}


def shapes(module):
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def test_keys_are_those_of_mmseg():
    expected = {"conv_seg.weight": (5, 16, 1, 1), "conv_seg.bias": (5,)}
    for index in range(4):
        expected |= conv(f"psp_modules.{index}.1", 12, 16, 1)
    expected |= conv("bottleneck", 12 + 4 * 16, 16, 3) | conv("fpn_bottleneck", 4 * 16, 16, 3)
    for index, channels in enumerate(WIDTHS[:3]):
        expected |= conv(f"lateral_convs.{index}", channels, 16, 1) | conv(f"fpn_convs.{index}", 16, 16, 3)
    assert shapes(UperNet(WIDTHS, 5, channels=16)) == expected
    expected = {"conv_seg.weight": (5, 8, 1, 1), "conv_seg.bias": (5,), **conv("convs.0", 10, 8, 3)}
    assert shapes(FCNHead(10, 5, channels=8)) == expected
    assert {key.split(".")[0] for key in segmentor().state_dict()} == {
        "backbone",
        "decode_head",
        "auxiliary_head",
    }


def layer(x, state, prefix):
    """A convolution with BatchNorm and ReLU from the tensors of a state dict."""
    weight = state[f"{prefix}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, variance = state[f"{prefix}.bn.running_mean"], state[f"{prefix}.bn.running_var"]
    return F.batch_norm(x, mean, variance, state[f"{prefix}.bn.weight"], state[f"{prefix}.bn.bias"]).relu()


def test_upernet_computes_what_the_paper_draws():
    head = fill(UperNet(WIDTHS, 5, channels=16)).eval()
    state, maps = head.state_dict(), pyramid()
    pools = [
        resize(layer(F.adaptive_avg_pool2d(maps[3], scale), state, f"psp_modules.{index}.1"), (4, 4))
        for index, scale in enumerate((1, 2, 3, 6))
    ]
    p3 = layer(torch.cat([maps[3], *pools], 1), state, "bottleneck")
    p2 = layer(maps[2], state, "lateral_convs.2") + resize(p3, (8, 8))
    p1 = layer(maps[1], state, "lateral_convs.1") + resize(p2, (16, 16))
    p0 = layer(maps[0], state, "lateral_convs.0") + resize(p1, (32, 32))
    levels = [layer(p, state, f"fpn_convs.{index}") for index, p in enumerate((p0, p1, p2))]
    fused = torch.cat([resize(level, (32, 32)) for level in [*levels, p3]], 1)
    expected = F.conv2d(
        layer(fused, state, "fpn_bottleneck"), state["conv_seg.weight"], state["conv_seg.bias"]
    )
    close(head(maps), expected)


def test_logits_have_the_size_of_the_image():
    model = segmentor()
    logits, auxiliary = model.train()(image(64, 96))
    assert logits.shape == auxiliary.shape == (2, 5, 64, 96)
    assert model.eval()(image(64, 96)).shape == (2, 5, 64, 96)
    assert segmentor(auxiliary=False).train()(image(64, 96)).shape == (2, 5, 64, 96)


def test_published_segmentors_and_backbones_load():
    def zeroed():
        model = segmentor()
        for tensor in model.state_dict().values():
            tensor.zero_()
        return model

    def differing(model):
        return {k for k, value in model.state_dict().items() if not torch.equal(value, published[k])}

    published, model = segmentor(img_size=288, pretrain_size=288).state_dict(), zeroed()
    assert load_checkpoint(model, {"state_dict": published}) == ([], [])
    assert differing(model) == {"backbone.pos_embed"}  # resized
    assert model.backbone.pos_embed.abs().sum() > 0

    published, model = segmentor().state_dict(), zeroed()
    of_backbone = {k.removeprefix("backbone."): v for k, v in published.items() if k.startswith("backbone.")}
    loaded = load_checkpoint(model, of_backbone)
    assert not loaded.unexpected
    assert {key.split(".")[0] for key in loaded.missing} == {"decode_head", "auxiliary_head"}
    assert not any(key.startswith("backbone.") for key in differing(model))


def test_freezing_leaves_adapters_and_heads():
    model = segmentor()
    add_adapters(model.backbone, 4)
    trained = {name for name, p in freeze_backbone(model).named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters() if "adaptmlp" in name or "_head." in name} == trained


def test_every_parameter_learns_under_autocast_too():
    model = segmentor().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, auxiliary = model(image(64, 96, batch=4))
    labels = seeded("labels", (4, 64, 96)).abs().mul(2).long().clamp(max=4)
    (F.cross_entropy(logits.float(), labels) + 0.4 * F.cross_entropy(auxiliary.float(), labels)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    heads = [grad for name, grad in gradients.items() if "head" in name]
    assert all(grad.abs().sum() > 0 for grad in heads)


def test_export():
    heads = {
        UperNet: fill(UperNet(WIDTHS, 5, channels=16)).eval(),
        FCNHead: fill(FCNHead(10, 5, channels=8)).eval(),
    }
    for head in heads.values():
        close(torch.export.export(head, (pyramid(),)).module()(pyramid()), head(pyramid()))


def test_maps_of_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"maps must have \[6, 8, 10, 12\] channels, got \[6, 8, 10\]"):
        UperNet(WIDTHS, 5, channels=16)(pyramid()[:3])
    head = FCNHead(WIDTHS[2], 5, channels=16)
    with pytest.raises(ValueError, match=r"map 2 must have 10 channels, the maps have \[6, 8\]"):
        head(pyramid()[:2])
    with pytest.raises(ValueError, match=r"map 2 must have 10 channels, the maps have \[6, 8, 12\]"):
        head([pyramid()[level] for level in (0, 1, 3)])
