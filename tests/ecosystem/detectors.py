# SPDX-License-Identifier: Apache-2.0
"""Small detectors of transformers, ultralytics and rfdetr, drawn shapes to train them on, and their losses."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.ecosystem import families

CLASSES = 3
SIZE = 64  # pixels of a side
# As many queries as the levels have pixels: with a choice of them, another rounding would choose others.
QUERIES = 8 * 8 + 4 * 4 + 2 * 2


class Scene(NamedTuple):
    """Two images, each with two rectangles of two of three colours."""

    pixels: Tensor
    classes: list[Tensor]
    boxes: list[Tensor]  # centers and extents, as shares of the image
    masks: list[Tensor]


def scene(number: int = 0, size: int = SIZE) -> Scene:
    draw = torch.Generator().manual_seed(number)
    drawn = Scene(torch.zeros(2, 3, size, size), [], [], [])
    for image in drawn.pixels:
        corners = torch.randint(0, size // 2, (2, 2), generator=draw)
        extents = torch.randint(size // 4, size // 2, (2, 2), generator=draw)
        classes = torch.randperm(CLASSES, generator=draw)[:2]
        masks = torch.zeros(2, size, size)
        for (x, y), (width, height), kind, mask in zip(corners.tolist(), extents.tolist(), classes, masks):
            mask[y : y + height, x : x + width] = 1
            image[kind, y : y + height, x : x + width] = 1
        drawn.classes.append(classes)
        drawn.boxes.append(torch.cat([corners + extents / 2, extents], -1) / size)
        drawn.masks.append(masks)
    return drawn


class Detector(NamedTuple):
    package: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Scene], Tensor]
    family: str = ""  # of transformers
    # At a lower learning rate, some runs make no other choice in all steps, and others do.
    rate: float = 1e-3

    @property
    def reason(self) -> str | None:
        """Why it cannot be built here, if it cannot."""
        if importlib.util.find_spec(self.package) is None:
            target = "test-ecosystem" if self.package == "transformers" else "test-detectors"
            return f"needs {self.package}: make {target}"
        if self.family and not families.is_installed(self.family):
            return f"the installed transformers has no {self.family}"
        return None


def _boxes_of_transformers(model: nn.Module, given: Scene) -> Tensor:
    labels = [{"class_labels": kinds, "boxes": boxes} for kinds, boxes in zip(given.classes, given.boxes)]
    return model(pixel_values=given.pixels, labels=labels).loss


def _masks_of_transformers(model: nn.Module, given: Scene) -> Tensor:
    return model(pixel_values=given.pixels, mask_labels=given.masks, class_labels=given.classes).loss


def _of_transformers(
    family: str, loss: Callable[..., Tensor], rate: float = 1e-3, **options: Any
) -> Detector:
    build = functools.partial(families.build, family, num_labels=CLASSES, **options)
    return Detector("transformers", build, loss, family, rate)


def _spread(model: nn.Module) -> nn.Module:
    """The model with offsets and attention weights that depend on the query: as projects start, they are constant."""
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=0.02)
    return model


# The layers of rtdetr-l.yaml, narrower and fewer: from, repeats, module, arguments.
ULTRALYTICS: dict[str, Any] = dict(
    nc=CLASSES,
    backbone=[
        [-1, 1, "HGStem", [8, 16]],
        [-1, 1, "HGBlock", [8, 16, 3]],
        [-1, 1, "DWConv", [16, 3, 2, 1, False]],
        [-1, 1, "HGBlock", [8, 32, 3]],
        [-1, 1, "DWConv", [32, 3, 2, 1, False]],
        [-1, 1, "HGBlock", [8, 32, 5, True, False]],
        [-1, 1, "DWConv", [32, 3, 2, 1, False]],
        [-1, 1, "HGBlock", [8, 32, 5, True, False]],
    ],
    head=[
        [-1, 1, "AIFI", [32, 4]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 5], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [[3, 11, 8], 1, "RTDETRDecoder", [CLASSES, 32, QUERIES, 4, 4, 2, 32, 0.0, None, -1, 8]],
    ],
)


def _build_ultralytics() -> nn.Module:
    from ultralytics.nn.tasks import RTDETRDetectionModel

    torch.manual_seed(0)
    model = RTDETRDetectionModel(ULTRALYTICS, nc=CLASSES, verbose=False)
    model.nc = CLASSES  # as its trainer does
    return _spread(model)


def _loss_of_ultralytics(model: nn.Module, given: Scene) -> Tensor:
    counts = torch.tensor([len(each) for each in given.classes])
    batch = dict(
        img=given.pixels,
        batch_idx=torch.arange(len(counts)).repeat_interleave(counts),
        cls=torch.cat(given.classes),
        bboxes=torch.cat(given.boxes),
    )
    return model.loss(batch)[0]


def _configs_of_rfdetr() -> tuple[Any, Any]:
    from rfdetr.config import RFDETRNanoConfig, TrainConfig

    model = RFDETRNanoConfig(
        pretrain_weights=None, num_classes=CLASSES, resolution=SIZE, hidden_dim=32, sa_nheads=4,
        ca_nheads=4, num_queries=8 * 8 + 4 * 4, num_select=9, group_detr=2, out_feature_indexes=[1, 2, 3], device="cpu",
        projector_scale=["P3", "P4"],
    )  # fmt: skip
    return model, TrainConfig(dataset_dir=".", output_dir=".")


def _build_rfdetr() -> nn.Module:
    from rfdetr.models.backbone import dinov2
    from rfdetr.models.lwdetr import build_model_from_config

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = dinov2.get_config("small", False) | small
    with (
        mock.patch.object(dinov2, "get_config", return_value=config),
        mock.patch.dict(dinov2.size_to_width, small=32),
    ):
        return _spread(build_model_from_config(*_configs_of_rfdetr()))


@functools.cache
def _criterion_of_rfdetr() -> nn.Module:
    from rfdetr.models.lwdetr import build_criterion_from_config

    return build_criterion_from_config(*_configs_of_rfdetr())[0]


def _loss_of_rfdetr(model: nn.Module, given: Scene) -> Tensor:
    targets = [{"labels": kinds, "boxes": boxes} for kinds, boxes in zip(given.classes, given.boxes)]
    criterion = _criterion_of_rfdetr()
    losses = criterion(model(given.pixels, targets), targets)
    return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)


# Without dropout and denoising, which draw random numbers, all runs see the same.
DETECTORS = {
    "deformable_detr": _of_transformers(
        "deformable_detr",
        _boxes_of_transformers,
        4e-3,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    ),
    "rt_detr_v2": _of_transformers(
        "rt_detr_v2", _boxes_of_transformers, num_queries=QUERIES, num_denoising=0
    ),
    "d_fine": _of_transformers("d_fine", _boxes_of_transformers, num_queries=QUERIES, num_denoising=0),
    "mask2former": _of_transformers("mask2former", _masks_of_transformers, 4e-3, dropout=0.0),
    "ultralytics": Detector("ultralytics", _build_ultralytics, _loss_of_ultralytics),
    "rfdetr": Detector("rfdetr", _build_rfdetr, _loss_of_rfdetr),
}


def detectors(*names: str) -> pytest.MarkDecorator:
    chosen = {name: each for name, each in DETECTORS.items() if name in names or not names}
    return pytest.mark.parametrize(
        "detector",
        [
            pytest.param(each, id=name, marks=[pytest.mark.skip(reason=each.reason)] * bool(each.reason))
            for name, each in chosen.items()
        ],
    )
