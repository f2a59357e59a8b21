# SPDX-License-Identifier: Apache-2.0
"""Random arguments for layers of each interface: one image, 300 queries, levels of 40 x 40 pixels and smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

QUERIES, SIDE = 300, 40
Call = tuple[tuple[Any, ...], dict[str, Any]]


def _attribute(layer: nn.Module, *names: str) -> Any:
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def _heads(layer: Any) -> int:
    return int(_attribute(layer, "n_heads", "num_heads"))


def _levels(layer: Any) -> int:
    return int(_attribute(layer, "n_levels", "num_levels"))


def _width(layer: Any) -> int:
    return int(_attribute(layer, "d_model", "embed_dims", "embed_dim"))


def _sizes(layer: Any) -> list[tuple[int, int]]:
    return [(SIDE >> level, SIDE >> level) for level in range(_levels(layer))]


def _pixels(layer: Any) -> int:
    return sum(height * width for height, width in _sizes(layer))


def _drawn(*shape: int) -> Tensor:
    return torch.rand(shape).requires_grad_()


def _levels_of(layer: Any) -> dict[str, Tensor]:
    shapes = torch.tensor(_sizes(layer))
    return {"shapes": shapes, "starts": shapes.prod(1).cumsum(0) - shapes.prod(1)}


def deformable_detr(layer: Any) -> Call:
    levels, width = _levels_of(layer), _width(layer)
    points = _drawn(1, QUERIES, _levels(layer), 2)
    return (_drawn(1, QUERIES, width), points, _drawn(1, _pixels(layer), width), *levels.values()), {}


def mmcv(layer: Any) -> Call:
    levels, width = _levels_of(layer), _width(layer)
    query, value = _drawn(1, QUERIES, width), _drawn(1, _pixels(layer), width)
    if not layer.batch_first:
        query, value = (each.detach().transpose(0, 1).requires_grad_() for each in (query, value))
    named = {"value": value, "reference_points": _drawn(1, QUERIES, _levels(layer), 2)}
    return (query,), {**named, "spatial_shapes": levels["shapes"], "level_start_index": levels["starts"]}


def transformers(layer: Any) -> Call:
    levels, width = _levels_of(layer), _width(layer)
    points = _drawn(1, QUERIES, _levels(layer), 2)
    value = _drawn(1, _pixels(layer), width)
    return (_drawn(1, QUERIES, width), value, None, points, levels["shapes"], _sizes(layer)), {}


def boxes(layer: Any) -> Call:
    """The interface of RT-DETR and ultralytics: one box for all levels, sizes as pairs."""
    width = _width(layer)
    given = (_drawn(1, QUERIES, width), _drawn(1, QUERIES, 1, 4), _drawn(1, _pixels(layer), width))
    return (*given, _sizes(layer)), {}


def oriented_boxes(layer: Any) -> Call:
    (query, _, *others), named = boxes(layer)
    return (query, _drawn(1, QUERIES, 1, 5), *others), named


def of_levels(layer: Any) -> Call:
    """D-FINE's interface: a list of levels [B, M, D, S_l]."""
    heads, width = _heads(layer), _width(layer)
    value = [_drawn(1, heads, width // heads, h * w) for h, w in _sizes(layer)]
    return (_drawn(1, QUERIES, width), _drawn(1, QUERIES, 1, 4), value, _sizes(layer)), {}


def of_maps(layer: Any) -> Call:
    """GTR's interface: a list of maps [B * M, D, H, W]."""
    (query, points, value, sizes), named = of_levels(layer)
    maps = [
        each.detach().flatten(0, 1).unflatten(-1, size).requires_grad_() for each, size in zip(value, sizes)
    ]
    return (query, points, maps, sizes), named


def oriented_maps(layer: Any) -> Call:
    (query, _, *others), named = of_maps(layer)
    return (query, _drawn(1, QUERIES, 1, 5), *others), named


def temporal(layer: Any) -> Call:
    """BEVFormer's temporal attention: every pixel is a query, and the value has two frames."""
    levels, width, pixels = _levels_of(layer), _width(layer), _pixels(layer)
    named = {"value": _drawn(2, pixels, width), "reference_points": _drawn(2, pixels, _levels(layer), 2)}
    return (_drawn(1, pixels, width),), {
        **named,
        "spatial_shapes": levels["shapes"],
        "level_start_index": levels["starts"],
    }


def anchors(layer: Any) -> Call:
    """BEVFormer's spatial cross attention: points at four heights for each query."""
    call, named = mmcv(layer)
    return call, {**named, "reference_points": _drawn(1, QUERIES, 4, 2)}


def segments(layer: Any) -> Call:
    """TadTR's interface: time is the only axis."""
    lengths, width = torch.tensor([SIDE >> level for level in range(_levels(layer))]), _width(layer)
    points = _drawn(1, QUERIES, _levels(layer), 1)
    value = _drawn(1, int(lengths.sum()), width)
    return (_drawn(1, QUERIES, width), points, value, lengths, lengths.cumsum(0) - lengths), {}


CALLS: dict[str, Callable[[Any], Call]] = {
    each.__name__: each
    for each in (
        *(deformable_detr, mmcv, transformers, boxes, oriented_boxes, of_levels, of_maps, oriented_maps),
        *(temporal, anchors, segments),
    )
}
