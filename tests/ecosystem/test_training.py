# SPDX-License-Identifier: Apache-2.0
"""Small detectors train on drawn shapes: a patch changes the losses no more than changes of 1e-6 in the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitkern
from tests.ecosystem import families

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytestmark = pytest.mark.slow

STEPS, SHORT = 50, 20
NOISE, RUNS = 1e-6, 3
# Without dropout and denoising, which draw random numbers, all runs see the same.
OPTIONS = {
    "deformable_detr": dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, num_labels=3),
    "rt_detr_v2": dict(num_denoising=0, num_labels=3),
    "d_fine": dict(num_denoising=0, num_labels=3),
    "mask2former": dict(dropout=0.0, num_labels=3),
}
each_family = pytest.mark.parametrize("family", OPTIONS)


def shapes(step: int, family: str) -> dict[str, object]:
    """Two images, each with two rectangles of two of three colours, and their boxes or masks."""
    draw = torch.Generator().manual_seed(step % 4)
    size = families.SIZE
    pixels, labels = torch.zeros(2, 3, size, size), []
    for image in pixels:
        corners = torch.randint(0, size // 2, (2, 2), generator=draw)
        extents = torch.randint(size // 4, size // 2, (2, 2), generator=draw)
        classes = torch.randperm(3, generator=draw)[:2]
        masks = torch.zeros(2, size, size)
        for (x, y), (width, height), kind, mask in zip(corners.tolist(), extents.tolist(), classes, masks):
            mask[y : y + height, x : x + width] = 1
            image[kind, y : y + height, x : x + width] = 1
        boxes = torch.cat([corners + extents / 2, extents], -1) / size
        labels.append({"class_labels": classes, "boxes": boxes, "masks": masks})
    if family == "mask2former":
        names = {"mask_labels": "masks", "class_labels": "class_labels"}
        return {
            "pixel_values": pixels,
            **{name: [each[key] for each in labels] for name, key in names.items()},
        }
    return {
        "pixel_values": pixels,
        "labels": [{key: each[key] for key in ("class_labels", "boxes")} for each in labels],
    }


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights differ by up to NOISE of themselves."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + NOISE * (2 * torch.rand(parameter.shape, generator=draw) - 1))
    return model


def train(
    model: nn.Module, family: str, steps: int, *, autocast: bool = False
) -> tuple[list[float], list[torch.Tensor]]:
    """The losses, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses, first = [], []
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**shapes(step, family)).loss
        optimizer.zero_grad()
        loss.backward()
        first = first or [each.grad.clone() for each in model.parameters() if each.grad is not None]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, first


def model_of(family: str) -> nn.Module:
    model = families.build(family, **OPTIONS[family])
    for module in model.modules():  # statistics of two images are noise
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference as a share of the largest gradient of the model."""
    largest = max(float(each.abs().max()) for each in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest


@each_family
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_patched_detector_trains_as_its_own(family, autocast):
    if not families.is_installed(family):
        pytest.skip(f"the installed transformers has no {family}")
    model, steps = model_of(family), SHORT if autocast else STEPS
    runs = [train(shaken(model, seed), family, steps, autocast=autocast) for seed in range(RUNS)]
    own, gradients = train(copy.deepcopy(model), family, steps, autocast=autocast)
    assert vitkern.patch(model, strict=True)
    losses, first = train(model, family, steps, autocast=autocast)
    if not autocast:
        assert losses[0] == pytest.approx(own[0], rel=1e-5)
        assert distance(first, gradients) <= 1e-4
        assert losses[-1] < own[0] / 2
    for step, loss in enumerate(losses):
        curves = [own[step], *(run[step] for run, _ in runs)]
        # Later steps differ more: the spread so far, of all curves, is the measure.
        spread = max(abs(run[at] - own[at]) for run, _ in runs for at in range(step + 1))
        unit = 2e-2 if autocast else 1e-5
        assert min(curves) - 2 * spread - unit * own[0] <= loss <= max(curves) + 2 * spread + unit * own[0], (
            step
        )
