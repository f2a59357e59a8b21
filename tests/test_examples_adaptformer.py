# SPDX-License-Identifier: Apache-2.0
"""examples/finetune_adaptformer.py: trains, resumes after a kill, and reaches the expected accuracy."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import run_in_two_processes

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ["--pretrain-epochs", "1", "--epochs", "1", "--samples", "256", "--device", "cpu"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune_adaptformer

    return finetune_adaptformer


def test_an_epoch_of_each_writes_what_was_trained_and_no_more(example, tmp_path, capsys):
    example.main([*QUICK, "--output", str(tmp_path)])
    said = capsys.readouterr()
    assert "parameters trained (4." in said.out
    assert said.err.count("epoch 1: loss") == 2 and "s left" in said.err
    whole, tuned = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("pretrained", "adapted")
    )
    assert all(".adaptmlp." in key or key.startswith("head.") for key in tuned)
    assert not any(".adaptmlp." in key for key in whole) and "blocks.0.fc1.weight" in whole


def test_a_kill_loses_no_more_than_an_epoch(example, tmp_path, capsys):
    """Killed while it writes the second epoch, it resumes from the first and ends with the same result."""
    killed_in_the_second_epoch = (
        "import os, signal, common, finetune_adaptformer as example\n"
        "def write(state, path, whole=common.write):\n"
        "    if path.name == 'adapted.pt' and state['epochs'] == 2:\n"
        "        path.with_name(path.name + '.tmp').write_bytes(b'half of it')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(state, path)\n"
        "common.write = write\n"
        "example.main()\n"
    )
    options = [*QUICK, "--epochs", "2", "--threads", "1", "--output"]
    command = [sys.executable, "-c", killed_in_the_second_epoch, *options, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert example.main([*options, str(tmp_path / "killed")]) == example.main(
        [*options, str(tmp_path / "straight")]
    )
    assert "adapted: 1 of 2 epochs are done" in capsys.readouterr().out
    resumed, straight = (
        torch.load(tmp_path / folder / "adapted.pt", weights_only=True) for folder in ("killed", "straight")
    )
    torch.testing.assert_close(resumed["model"], straight["model"])
    torch.testing.assert_close(resumed["optimizer"]["state"], straight["optimizer"]["state"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"], ["--amp", "bf16"]], ids=["ddp", "fsdp", "bf16"])
def test_two_processes(options, tmp_path):
    said = run_in_two_processes("finetune_adaptformer.py", *QUICK, "--output", tmp_path, *options)
    assert said.count("held-out accuracy") == 2
    assert (tmp_path / "adapted.pt").exists()


@pytest.mark.slow
def test_accuracy(example, tmp_path):
    assert example.main(["--device", "cpu", "--threads", "1", "--output", str(tmp_path)]) >= 0.95
