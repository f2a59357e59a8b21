# SPDX-License-Identifier: Apache-2.0
"""This package's models through timm's own functions."""

import pytest
import torch

import vitkern
from tests.helpers import image
from vitkern.models.table import count_parameters

timm = pytest.importorskip("timm")
create_optimizer_v2 = pytest.importorskip("timm.optim").create_optimizer_v2


@pytest.fixture(autouse=True)
def registered():
    import vitkern.compat.timm  # noqa: F401


def test_every_name_is_known():
    assert set(vitkern.list_models()) <= set(timm.list_models())
    with torch.device("meta"):
        assert count_parameters(timm.create_model("vit_adapter_base", img_size=384)) == 99_787_232


def test_features_and_classifiers():
    with torch.device("meta"):
        pyramid = timm.create_model("vt_fpn_resnet50", features_only=True, out_indices=(1, -1))
        assert pyramid.feature_info.channels() == [256, 256] and pyramid.feature_info.reduction() == [8, 32]
        model = timm.create_model("vitae_tiny", num_classes=0, in_chans=1, drop_path_rate=0.1)
        model.reset_classifier(7)
        assert model.get_classifier().out_features == 7
        with pytest.raises(ValueError, match="has no weights to download"):
            timm.create_model("vt_resnet18", pretrained=True)


def test_weights_and_optimizers(tmp_path):
    options = dict(embed_dim=48, depth=4, num_heads=3, deform_num_heads=3)
    model = vitkern.create_model("vit_adapter_tiny", **options)
    vitkern.models.save_checkpoint(model, tmp_path / "weights.pth")
    again = timm.create_model("vit_adapter_tiny", checkpoint_path=str(tmp_path / "weights.pth"), **options)
    assert torch.equal(again.eval()(image())[0], model.eval()(image())[0])
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert all(
        (id(p) in decayed) == (p.dim() > 1 and name not in model.no_weight_decay())
        for name, p in model.named_parameters()
    )
