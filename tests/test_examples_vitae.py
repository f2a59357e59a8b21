# SPDX-License-Identifier: Apache-2.0
"""examples/classify_vitae.py: trains, resumes, draws, and reaches the expected accuracy."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import run_in_two_processes

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("classify_vitae")


def test_an_epoch_then_another_after_a_kill(example, tmp_path, capsys):
    epoch = ["--threads", "2", "--samples", "128", "--output", str(tmp_path)]
    example.main([*epoch, "--epochs", "1"])
    first = torch.load(tmp_path / "vitae.pt", weights_only=True)
    (tmp_path / "vitae.pt.tmp").write_bytes(b"what a kill in the middle of writing leaves")
    example.main([*epoch, "--epochs", "2", "--amp", "bf16"])
    said = capsys.readouterr()
    assert "vitae: 1 of 2 epochs are done" in said.out and "held-out accuracy: 0." in said.out
    assert "epoch 2: loss" in said.err and "epoch 2" not in said.err.split("epoch 1: loss")[0]
    second = torch.load(tmp_path / "vitae.pt", weights_only=True)
    assert (first["epochs"], second["epochs"]) == (1, 2)
    assert not torch.equal(first["model"]["head.weight"], second["model"]["head.weight"])
    if importlib.util.find_spec("matplotlib"):
        assert {path.name for path in tmp_path.glob("*.png")} == {
            "vitae_attention_distance.png",
            "vitae_grad_cam.png",
        }


@pytest.mark.parametrize("left", [0, 1, 2], ids=["nothing", "half", "another model"])
def test_a_checkpoint_that_is_torn_is_one_sentence(example, left, tmp_path):
    whole, path, common = tmp_path / "whole.pt", tmp_path / "torn.pt", sys.modules["common"]
    torch.save({"epochs": 1, "model": {"weight": torch.zeros(3, 2)}, "optimizer": {}, "scaler": {}}, whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * left // 2])
    with pytest.raises(
        SystemExit, match=r"torn\.pt is torn, or of another model \(.*\): --fresh starts anew"
    ):
        common._resume(path, torch.nn.Linear(1, 1), None, None)


def test_digits_are_split_always_the_same_way_and_changed_a_little(example):
    digits = sys.modules["digits"]
    (train, held_out), (again, _) = digits.load_digits(32), digits.load_digits(32)
    assert (len(train.labels), len(held_out.labels)) == (1258, 539)
    assert train.images.shape[1:] == (1, 32, 32) and train.images.aminmax() == (-1, 1)
    assert torch.equal(train.images, again.images)
    changed = digits.augment(train.images[:64])
    # A digit stays where it is, more or less: what it shares with itself is most of what it shares with any.
    shared = torch.nn.functional.cosine_similarity(
        changed.flatten(1)[:, None] + 1, train.images[:64].flatten(1)[None] + 1, dim=-1
    )
    assert (shared.diagonal() > shared.median(1).values).float().mean() > 0.8
    assert changed.aminmax().min >= -1 and not torch.equal(changed, train.images[:64])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes(options, tmp_path):
    said = run_in_two_processes(
        "classify_vitae.py", "--epochs", "1", "--samples", "128", "--output", tmp_path, *options
    )
    assert said.count("held-out accuracy") == 1
    assert (tmp_path / "vitae.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vitae", "vitaev2"])
def test_accuracy(model, example, tmp_path):
    assert example.main(["--model", model, "--threads", "1", "--output", str(tmp_path)]) >= 0.97
