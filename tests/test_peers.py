# SPDX-License-Identifier: Apache-2.0
"""benchmarks/peers.py names the mistake of a wrong implementation, which is then not timed."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.peers import OURS, PEERS, Peer
from vitkern.cases import ATTENTION_CASES, MsDeformAttnCase, make_inputs
from vitkern.compat import deformable_detr

INPUTS = make_inputs(
    MsDeformAttnCase("small", "", 1, ((6, 5), (3, 2)), 40, 2, 8, 3), locations="uniform", dtype=torch.float32
)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def spoilt(position: int) -> Peer:
    """Our op with the gradient of one argument too large by 1 %."""

    def bind(_, inputs):
        attention = OURS.attention(inputs)

        def run(*tensors):
            tensors = list(tensors)
            tensors[position] = ScaledGradient.apply(tensors[position])
            return attention(*tensors)

        return run

    return Peer("spoilt", "vitkern", "", lambda: None, bind)


@pytest.mark.parametrize("position, name", list(enumerate(("value", "locations", "weights"))))
def test_a_wrong_gradient_is_named(position, name):
    assert spoilt(position).verdict(INPUTS).startswith(f"wrong: gradient of {name} off by 1.0e-02")


def test_vitkern_and_its_yardstick_are_right():
    for locations in ("uniform", "near"):
        inputs = make_inputs(ATTENTION_CASES["bev-tiny"].with_batch(1).shrunk(), locations=locations)
        assert OURS.verdict(inputs) == PEERS["grid_sample"].verdict(inputs) == "right"


def test_the_extension_of_deformable_detr_is_called_as_its_own_python_calls_it(monkeypatch):
    """A module with the same two functions stands in for the extension."""
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", deformable_detr)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
    peer = replace(PEERS["Deformable-DETR"], devices=("cpu",))
    assert peer.verdict(INPUTS) == "right"


def test_another_version_than_the_known_one_is_absent():
    other = Peer("other", "torch", "0.0.1", lambda: None, lambda *_: None)
    assert other.verdict(INPUTS) == f"absent: torch {torch.__version__} is installed, 0.0.1 is known here"


def test_what_is_not_installed_is_said_in_words():
    missing = Peer("missing", "no-such-package", "1.0", lambda: None, lambda *_: None)
    assert missing.objection("cpu") == "absent: no-such-package is not installed"
