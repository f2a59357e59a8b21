# SPDX-License-Identifier: Apache-2.0
"""examples/train_segmentation.py: trains, resumes, draws, and reaches the expected quality."""

import importlib
from pathlib import Path

import pytest
import torch

from tests.helpers import run_in_two_processes
from vitkern.models import FCNHead, Segmentor, UperNet, ViTAdapter

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_segmentation")


def tiny_adapter():
    backbone = ViTAdapter(embed_dim=24, depth=4, num_heads=3, deform_num_heads=3, conv_inplane=8)
    model = Segmentor(backbone, UperNet([24] * 4, 4, channels=8), FCNHead(24, 4, channels=8))
    return model, list(backbone.blocks)


def test_an_epoch_then_another_after_a_kill(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "MODELS", {"vit_adapter": tiny_adapter})
    monkeypatch.setattr(example, "TRAIN", 16)
    monkeypatch.setattr(example, "HELD_OUT", 8)
    epoch = ["--batch-size", "8", "--threads", "2", "--device", "cpu", "--output", str(tmp_path)]
    example.main([*epoch, "--epochs", "1"])
    first = torch.load(tmp_path / "vit_adapter.pt", weights_only=True)
    (tmp_path / "vit_adapter.pt.tmp").write_bytes(b"what a kill in the middle of writing leaves")
    example.main([*epoch, "--epochs", "2", "--amp", "bf16"])
    said = capsys.readouterr()
    assert "vit_adapter: 1 of 2 epochs are done" in said.out and "held-out mIoU: 0." in said.out
    second = torch.load(tmp_path / "vit_adapter.pt", weights_only=True)
    assert (first["epochs"], second["epochs"]) == (1, 2)
    key = "decode_head.conv_seg.weight"
    assert not torch.equal(first["model"][key], second["model"][key])
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "vit_adapter_masks.png").exists()


def test_a_batch_of_more_than_all_samples_is_refused(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "MODELS", {"vit_adapter": tiny_adapter})
    monkeypatch.setattr(example, "TRAIN", 16)
    with pytest.raises(SystemExit, match="--batch-size 17 is more than the 16 samples"):
        example.main(["--batch-size", "17", "--device", "cpu", "--output", str(tmp_path)])


@pytest.mark.parametrize("model", ["vit_adapter", "vt_fpn"])
def test_models_give_the_logits_of_pixels(model, example):
    net, blocks = example.MODELS[model]()
    with torch.no_grad():
        logits = net.eval()(example.make_shapes(2, 0).images)
    assert logits.shape == (2, len(example.CLASSES), 64, 64)
    assert blocks and all(any(block is part for part in net.modules()) for block in blocks)


def test_shapes_are_always_the_same_and_of_all_classes(example):
    (images, labels), again = example.make_shapes(64, 0), example.make_shapes(64, 0)
    assert torch.equal(images, again.images) and torch.equal(labels, again.labels)
    assert not torch.equal(labels, example.make_shapes(64, 1).labels)
    assert images.shape == (64, 3, 64, 64) and labels.shape == (64, 64, 64)
    shares = labels.flatten().bincount() / labels.numel()
    assert len(shares) == len(example.CLASSES) and shares.min() > 0.08
    # Only texture tells stripes from the background.
    grey = images.mean(1)
    assert (grey[labels == 3].mean() - grey[labels == 0].mean()).abs() < 0.1


def test_without_a_gpu_processes_share_no_statistics(example):
    net, _ = tiny_adapter()
    state = net.state_dict()
    example.share_statistics(net, torch.device("cpu"))
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in net.modules())
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


def test_intersections_over_unions(example, tmp_path):
    options = example.arguments(None, output=str(tmp_path)).parse_args(["--device", "cpu"])
    labels = torch.tensor([[[0, 0], [1, 2]]])
    predicted = torch.tensor([[[0, 1], [1, 2]]])
    logits = torch.nn.functional.one_hot(predicted, 4).movedim(-1, 1).float()
    data = example.Shapes(torch.zeros(1, 3, 2, 2), labels)
    ious = example.class_ious(example.Run(options), lambda images: logits, data, 1)
    assert ious.tolist() == [0.5, 0.5, 1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes(options, tmp_path):
    quick = ["--model", "vit_adapter", "--epochs", "1", "--samples", "64", "--output", tmp_path]
    assert run_in_two_processes("train_segmentation.py", *quick, *options).count("held-out mIoU") == 1
    assert (tmp_path / "vit_adapter.pt").exists()


@pytest.mark.slow
def test_mean_iou(example, tmp_path):
    """Half of the epochs that a user gets unasked are enough."""
    assert example.main(["--epochs", "4", "--threads", "1", "--output", str(tmp_path)]) >= 0.85
