# SPDX-License-Identifier: Apache-2.0
"""A patched layer of each small detector, deterministic, on the emulated CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitkern
from tests import emulated
from tests.ecosystem.detectors import Detector, detectors, scene
from tests.runners import ORDERED, RUNNERS

pytest.importorskip("scipy")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON)),
]
FREE = next(runner for runner in RUNNERS if runner.name == "cuda-emulated")


def first_call(detector: Detector) -> tuple[nn.Module, tuple, dict]:
    """A patched layer of the detector, and the arguments of its first call in training."""
    model = detector.build().train()
    vitkern.patch(model, strict=True)
    layer = next(each for each in model.modules() if hasattr(type(each), "patched_from"))
    calls: list[tuple] = []
    layer.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    detector.loss(model, scene())
    layer._forward_pre_hooks.clear()
    return layer, *calls[0]


def results(layer: nn.Module, positional: tuple, named: dict) -> list[Tensor]:
    """Output and gradients of all floating arguments and weights."""
    leaves: list[Tensor] = list(layer.parameters())

    def leaf(given):
        if isinstance(given, (list, tuple)):
            return type(given)(map(leaf, given))
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        leaves.append(given.detach().clone().requires_grad_())
        return leaves[-1]

    output = layer(*map(leaf, positional), **{name: leaf(each) for name, each in named.items()})
    output = output[0] if isinstance(output, tuple) else output
    down = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad((output * down).sum(), leaves, allow_unused=True)
    return [output.detach(), *(each for each in gradients if each is not None)]


@detectors()
def test_a_deterministic_layer_on_emulated_cuda_gives_the_same_bits(detector, monkeypatch):
    """In two orders of threads, where the sums of atomics differ."""
    layer, positional, named = first_call(detector)
    expected = results(layer, positional, named)
    monkeypatch.setenv("VITKERN_BACKEND", "cuda")

    def in_both_orders():
        for order in "01":
            monkeypatch.setenv("CUDA_EMU_ORDER", order)
            yield results(layer, positional, named)

    with FREE.active():
        assert not all(map(torch.equal, *in_both_orders()))
    with ORDERED.active():
        found, again = in_both_orders()
    assert all(map(torch.equal, found, again))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
