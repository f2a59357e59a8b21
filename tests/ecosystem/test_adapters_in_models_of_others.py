# SPDX-License-Identifier: Apache-2.0
"""Adapters in models of timm, torchvision and transformers; weights of timm in this package's models."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.parity.weights import fill, seeded
from vitkern.models import (
    AdaptFormer,
    AdaptFormerSwin,
    adapter_state_dict,
    add_adapters,
    freeze_backbone,
    load_adapter_state_dict,
    load_checkpoint,
)

IMAGE = seeded("image", (2, 3, 64, 64))
SWIN = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 4])
VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)


def timm(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, img_size=64, num_classes=5, **options)


def torchvision_vit():
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(64, 16, 2, 2, 48, 96, num_classes=5)


def torchvision_swin():
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)


def torchvision_swin_v2():
    swin = pytest.importorskip("torchvision").models.swin_transformer
    parts = dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    return swin.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5, **parts)


def transformers(kind, **options):
    def build():
        library = pytest.importorskip("transformers")
        config = getattr(library, f"{kind}Config")(image_size=64, num_labels=5, **options)
        return getattr(library, f"{kind}ForImageClassification")(config)

    return build


MODELS = {
    "timm-vit": timm("vit_tiny_patch16_224", depth=2),
    "timm-deit3": timm("deit3_small_patch16_224", depth=2),
    "timm-swin": timm("swin_tiny_patch4_window7_224", **SWIN),
    "timm-swinv2": timm("swinv2_tiny_window8_256", **SWIN),
    "torchvision-vit": torchvision_vit,
    "torchvision-swin": torchvision_swin,
    "torchvision-swinv2": torchvision_swin_v2,
    "transformers-vit": transformers("ViT", **VIT),
    "transformers-beit": transformers("Beit", **VIT),
    "transformers-dinov2": transformers("Dinov2", patch_size=16, **VIT),
    "transformers-swin": transformers("Swin", window_size=4, **SWIN),
    "transformers-swinv2": transformers("Swinv2", window_size=4, **SWIN),
}


def logits(model):
    output = model(IMAGE)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("option", ["parallel", "sequential"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters(name, option):
    model = fill(MODELS[name]()).eval()
    keys = set(model.state_dict())
    with torch.no_grad():
        plain = logits(model)
        freeze_backbone(add_adapters(model, 8, option=option))
        assert torch.equal(logits(model), plain)
        twin = copy.deepcopy(model)
        for key, parameter in model.named_parameters():
            if "up_proj" in key:
                nn.init.normal_(parameter)
        tuned = logits(model)
        assert not torch.equal(tuned, plain) and torch.equal(logits(twin), plain)
        load_adapter_state_dict(twin, adapter_state_dict(model))
        assert torch.equal(logits(twin), tuned)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    logits(torch.load(file, weights_only=False)).sum().backward()
    logits(model).sum().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert keys - trained == {key for key in keys if not key.startswith(("head", "classifier"))}
    assert {key for key in model.state_dict() if ".adaptmlp." in key} <= trained


@torch.no_grad()
def test_a_sequential_adapter_is_that_of_adaptformer():
    """A ViT of timm with an adapter after each feed-forward network, and our AdaptFormer with the same weights."""
    theirs = fill(add_adapters(timm("vit_tiny_patch16_224", depth=2)(), 8, option="sequential")).eval()
    tuning = dict(ffn_num=8, ffn_option="sequential", ffn_adapter_scalar=0.1)
    ours = AdaptFormer(
        img_size=64, embed_dim=192, depth=2, num_heads=3, num_classes=5, tuning_config=tuning
    ).eval()
    assert load_checkpoint(ours, theirs.state_dict(), strict=True) == ([], [])
    torch.testing.assert_close(ours(IMAGE), theirs(IMAGE), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size, window", [(64, 4), (224, 7)])
@torch.no_grad()
def test_a_swin_of_timm_computes_the_same_here(size, window):
    options = dict(
        img_size=size, window_size=window, embed_dim=24, depths=(2, 2, 2), num_heads=(1, 2, 4), num_classes=5
    )
    theirs = pytest.importorskip("timm").create_model("swin_tiny_patch4_window7_224", **options)
    ours = AdaptFormerSwin(**options)
    assert load_checkpoint(ours, fill(theirs).state_dict(), strict=True) == ([], [])
    image = seeded("image", (1, 3, size, size))
    torch.testing.assert_close(ours.eval()(image), theirs.eval()(image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_vit_of_timm_computes_the_same_here():
    theirs = fill(timm("vit_tiny_patch16_224", depth=2)())
    ours = AdaptFormer(img_size=64, embed_dim=192, depth=2, num_heads=3, num_classes=5)
    assert load_checkpoint(ours, theirs.state_dict(), strict=True) == ([], [])
    torch.testing.assert_close(ours.eval()(IMAGE), theirs.eval()(IMAGE), atol=1e-5, rtol=1e-5)
