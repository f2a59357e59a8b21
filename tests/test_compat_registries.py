# SPDX-License-Identifier: Apache-2.0
"""The registries of timm, mmseg and mmdet, tested with stand-ins. tests/ecosystem tests the real ones."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

import vitkern
from vitkern.models import BEiTAdapter, UniPerceiverAdapter, ViTAdapter, ViTBaseline

NAMES = ("ViTAdapter", "BEiTAdapter", "UniPerceiverAdapter", "ViTBaseline", "ViTAEv2")
SMALL = dict(embed_dim=48, depth=4, num_heads=3, conv_inplane=8)


class Registry(dict):
    """A stand-in for mmengine's registry: classes and functions by name, each registered once."""

    def register_module(self, name=None, module=None):
        assert isinstance(module, (type, type(lambda: None))) and name not in self
        self[name] = module

    def build(self, config):
        options = dict(config)
        return self[options.pop("type")](**options)


@pytest.fixture
def fresh(monkeypatch):
    """A function that imports a module of vitkern.compat again, with stand-ins for modules of other projects."""

    def load(name, **stand_ins):
        for path, attributes in stand_ins.items():
            module = ModuleType(path.replace("__", "."))
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, f"vitkern.compat.{name}", raising=False)
        module = importlib.import_module(f"vitkern.compat.{name}")
        del sys.modules[module.__name__]  # the stand-in's is not to stay behind
        return module

    return load


@pytest.fixture
def timm_entrypoints(fresh):
    entrypoints = {}

    def register_model(function):
        module = sys.modules[function.__module__]
        module.__all__.append(function.__name__)
        entrypoints[function.__name__] = function
        return function

    module = fresh("timm", timm={}, timm__models=dict(register_model=register_model))
    assert sorted(module.__all__) == vitkern.list_models()
    assert all(getattr(module, name) is function for name, function in entrypoints.items())
    return entrypoints


def test_timm_builds_every_model(timm_entrypoints):
    assert sorted(timm_entrypoints) == vitkern.list_models()
    timms = dict(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None)
    with torch.device("meta"):
        model = timm_entrypoints["vit_adapter_tiny"](**timms, img_size=384, out_indices=(1, 2))
        assert model.feature_info.reduction() == [8, 16] and model.pos_embed.shape[1] == 1 + 24 * 24
        assert timm_entrypoints["vitae_tiny"](num_classes=7).head.out_features == 7


def test_timm_finds_no_weights(timm_entrypoints):
    with pytest.raises(ValueError, match="vt_resnet18 has no weights to download: give checkpoint=file"):
        timm_entrypoints["vt_resnet18"](pretrained=True)


@pytest.mark.parametrize("project, variant", [("mmseg", "segmentation"), ("mmdet", "detection")])
def test_each_registry_has_its_form(project, variant, fresh):
    registry = Registry()
    fresh(project, **{project: {}, f"{project}__registry": dict(MODELS=registry)})
    assert set(registry) == {*NAMES, *vitkern.list_models(maps=True)}
    with torch.device("meta"):
        for kind in (ViTAdapter, BEiTAdapter, UniPerceiverAdapter):
            model = registry.build(dict(type=kind.__name__, **SMALL))
            assert type(model) is kind and model.variant == variant
        assert registry.build(dict(type="ViTAdapter", variant="detection", **SMALL)).variant == "detection"
        named = registry.build(dict(type="vit_adapter_tiny", out_indices=(0, 2)))
        assert named.variant == variant and named.feature_info.reduction() == [4, 16]
        assert registry.build(dict(type="vitaev2_s")).feature_info.channels() == [64, 128, 256, 512]
        baseline = registry.build(dict(type="ViTBaseline", embed_dim=64, depth=4, num_heads=4))
    assert type(baseline) is ViTBaseline


def test_the_official_vitaev2(fresh, tmp_path):
    registry, small = Registry(), dict(embed_dims=8, token_dims=[8, 16, 16, 32], NC_depth=1, NC_heads=2)
    small |= dict(type="ViTAEv2", RC_heads=1, NC_group=4, RC_group=1)
    fresh("mmseg", mmseg={}, mmseg__registry=dict(MODELS=registry))
    model = registry.build(small)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    weights = {key: torch.full_like(tensor, 2) for key, tensor in model.state_dict().items()}
    averages = {key: torch.full_like(tensor, 3) for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "state_dict_ema": averages}, tmp_path / "vitaev2.pth")
    for load_ema, value in ((True, 3), (False, 2)):
        built = registry.build(dict(small, pretrained=str(tmp_path / "vitaev2.pth"), load_ema=load_ema))
        assert all((parameter == value).all() for parameter in built.parameters())
    with pytest.raises(ValueError, match="frozen_stages must be -1, got 2"):
        registry.build(dict(small, frozen_stages=2))
