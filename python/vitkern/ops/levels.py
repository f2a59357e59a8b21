# SPDX-License-Identifier: Apache-2.0
"""The levels of a pyramid: converts the callers' forms to the tensors and numbers that the ops take."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from vitkern import _C
from vitkern.ops import fast_path, native


def as_levels(
    op: str,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    level_start_index: Tensor | Sequence[int] | None,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Shapes and first pixels of the levels as int64 tensors, without host reads."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: value must be a tensor, got {type(value).__name__}")
    if level_start_index is not None and not isinstance(level_start_index, Tensor):
        level_start_index = _as_starts(op, level_start_index, value.device)
    if not isinstance(spatial_shapes, Tensor):
        # Tensors made while something traces (dynamo, fake tensors, torch.func) belong to that trace alone.
        make = _kept if fast_path.nothing_traces() else _made
        try:
            sizes = tuple((index(height), index(width)) for height, width in spatial_shapes)
        except (TypeError, ValueError):
            raise TypeError(
                f"{op}: spatial_shapes must be an int64 tensor or pairs of whole numbers, got {spatial_shapes}"
            ) from None
        try:
            shapes, starts = make(sizes, value.device)
        except OverflowError:
            raise ValueError(
                f"{op}: spatial_shapes must be of sizes whose pixels int64 can count, got {spatial_shapes}"
            ) from None
        return shapes, starts if level_start_index is None else _as_int64(level_start_index)
    spatial_shapes = _as_int64(spatial_shapes)
    if level_start_index is None:
        if spatial_shapes.dim() != 2:
            return spatial_shapes, spatial_shapes.new_zeros(0)  # the op raises the error
        pixels = spatial_shapes.prod(-1)
        return spatial_shapes, pixels.cumsum(0) - pixels
    return spatial_shapes, _as_int64(level_start_index)


def _as_starts(op: str, level_start_index: Sequence[int], device: torch.device) -> Tensor:
    try:
        starts = [index(start) for start in level_start_index]
        _to_be_int64(*starts)
    except TypeError:
        raise TypeError(
            f"{op}: level_start_index must be an int64 tensor or whole numbers, got {level_start_index!r}"
        ) from None
    except OverflowError:
        raise ValueError(
            f"{op}: level_start_index must be of numbers that int64 holds, got {level_start_index!r}"
        ) from None
    return torch.tensor(starts, device=device).long()


def _as_int64(tensor: Tensor) -> Tensor:
    """Converts whole numbers of any type to int64; other types stay unchanged, for the op to refuse."""
    if tensor.dtype == torch.int64 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    return tensor.long()


def _to_be_int64(*numbers: int) -> None:
    """Refuses numbers beyond int64, as torch's own message names no argument. A trace's symbols are not tested."""
    if fast_path.nothing_traces() and any(not -(2**63) <= number < 2**63 for number in numbers):
        raise OverflowError


def _starts(shapes: tuple[tuple[int, int], ...]) -> list[int]:
    starts, first = [], 0
    for height, width in shapes:
        starts.append(first)
        first += height * width
    return starts


def _made(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    starts = _starts(shapes)
    with torch.inference_mode(False):  # made in inference mode they could not be saved for a later backward
        sizes = torch.tensor(shapes, device=device).view(-1, 2).long()
        return sizes, torch.tensor(starts, device=device).long()


@functools.lru_cache(maxsize=256)
def _kept(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    _to_be_int64(*(size for shape in shapes for size in shape), *_starts(shapes))
    return _made(shapes, device)


def whole_numbers(op: str, points_per_level: Sequence[int] | None) -> tuple[int, ...] | None:
    if points_per_level is None:
        return None
    try:
        return tuple(index(points) for points in points_per_level)
    except TypeError:
        raise TypeError(f"{op}: points_per_level must be whole numbers, got {points_per_level!r}") from None


def check_levels(op: str, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> None:
    """Checks that the levels cover value's pixels; on a card, which it waits for, only if VITKERN_VALIDATE=1."""
    if value.is_cpu or os.environ.get("VITKERN_VALIDATE") == "1":
        tables = spatial_shapes, level_start_index
        shapes, starts = (table.cpu().long().resolve_neg().contiguous() for table in tables)
        _host().check_levels(op, shapes, starts, value.shape[1])


@functools.cache
def _host() -> _C.Host:
    return native.host("cpu", torch.device("cpu"))
