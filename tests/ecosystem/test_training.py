# SPDX-License-Identifier: Apache-2.0
"""Small detectors train on drawn shapes: a patch changes the losses no more than changes of 1e-6 in the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import vitkern
from tests.ecosystem.detectors import Detector, detectors, scene

pytest.importorskip("scipy")
pytestmark = pytest.mark.slow

STEPS, SHORT = 50, 20
NOISE, RUNS = 1e-6, 3


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Two threads wait for each other longer than they compute, in calls this small."""
    torch.set_num_threads(1)


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights differ by up to NOISE of themselves."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + NOISE * (2 * torch.rand(parameter.shape, generator=draw) - 1))
    return model


def train(
    model: nn.Module, detector: Detector, steps: int, *, autocast: bool = False
) -> tuple[list[float], list[Tensor]]:
    """The losses, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=detector.rate, weight_decay=0.0)
    losses, first = [], []
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = detector.loss(model, scene())
        optimizer.zero_grad()
        loss.backward()
        first = first or [each.grad.clone() for each in model.parameters() if each.grad is not None]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, first


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference as a share of the largest gradient of the model."""
    largest = max(float(each.abs().max()) for each in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest


def spread(own: list[float], model: nn.Module, detector: Detector, *, autocast: bool = False) -> float:
    """The largest difference that shaken weights make, at any step."""
    runs = [train(shaken(model, seed), detector, len(own), autocast=autocast)[0] for seed in range(RUNS)]
    return max(abs(a - b) for run in runs for a, b in zip(run, own))


@detectors()
def test_a_patched_detector_trains_as_its_own(detector):
    """A curve jumps where a box is matched to another query, at other steps in other runs: all share one measure.

    Step by step, one of six unpatched runs leaves twice the spread of three others.
    """
    model = detector.build()
    own, gradients = train(copy.deepcopy(model), detector, STEPS)
    measure = spread(own, model, detector)
    assert vitkern.patch(model, strict=True)
    losses, first = train(model, detector, STEPS)
    assert losses[0] == pytest.approx(own[0], rel=1e-5)
    assert distance(first, gradients) <= 1e-4
    assert losses[-1] < losses[0] / 2
    assert max(abs(a - b) for a, b in zip(losses, own)) <= 2 * measure
    assert measure <= 0.1 * own[0]  # or it measures nothing


@detectors()
def test_a_patched_detector_trains_as_its_own_in_bfloat16(detector):
    model = detector.build()
    own, _ = train(copy.deepcopy(model), detector, SHORT, autocast=True)
    measure = spread(own, model, detector, autocast=True)
    assert vitkern.patch(model, strict=True)
    losses, _ = train(model, detector, SHORT, autocast=True)
    assert losses[-1] < losses[0]
    assert max(abs(a - b) for a, b in zip(losses, own)) <= 2 * measure


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64")
@detectors()
def test_no_step_differs_in_float64(detector, monkeypatch):
    """Without rounding that a choice could depend on, the curves never part."""
    if detector.family == "d_fine":  # its loss puts float32 among tensors of the default type
        monkeypatch.setattr(Tensor, "float", Tensor.double)
    model = detector.build().double()
    own, gradients = train(copy.deepcopy(model), detector, STEPS)
    assert vitkern.patch(model, strict=True)
    losses, first = train(model, detector, STEPS)
    assert distance(first, gradients) <= 1e-12
    assert losses == pytest.approx(own, rel=1e-6)
