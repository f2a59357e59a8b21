# SPDX-License-Identifier: Apache-2.0
"""The public functions: what they compute, what they take and give, and where they run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from vitkern.ops import direct
from vitkern.ops import ms_deform_attn as ops


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points_per_level: Sequence[int] | None = None,
    method: str = "bilinear",
    backend: str | None = None,
) -> Tensor:
    """Multi-scale deformable attention: for each query and head, the weighted sum of samples of a feature pyramid.

    ``output[b, q, m] = sum over l, p of attention_weights[b, q, m, l, p] * sample(value of level l, head m, at
    sampling_locations[b, q, m, l, p])``

    Args:
        value: ``[B, S, M, D]``, the pixels of all levels one after the other, M heads of D channels. float32, float64,
            float16 or bfloat16, any strides.
        spatial_shapes: ``[L, 2]`` int64 tensor of (height, width) on value's device, or a sequence of pairs.
            The sizes add up to S.
        level_start_index: ``[L]`` int64, the first pixel of each level; None: the levels follow one another.
        sampling_locations: ``[B, Q, M, L, P, 2]`` as (x, y), where 0 and 1 are a level's outer edges; pixel centres
            are at (i + 0.5) / size. Kept in float32 at least: 16-bit numbers cannot address a pixel in a wide map.
        attention_weights: ``[B, Q, M, L, P]``.
        points_per_level: for levels with different numbers of points, those L numbers. Locations are then
            ``[B, Q, M, K, 2]`` and weights ``[B, Q, M, K]`` with K their sum, level after level.
        method: ``"bilinear"`` (zeros outside the level) or ``"nearest"``, the 'discrete' sampling of RT-DETR v2:
            pixel ``floor(location * size + 0.5)``, clamped to the level; the gradient of locations is zero.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the best for the tensors.

    Returns:
        ``[B, Q, M * D]`` in value's dtype. Sums are made in float32 (float64 for float64).

    A location that is NaN, infinite or outside adds nothing and receives zero gradient. Gradients flow to value,
    locations and weights; a second derivative raises, except with ``backend="reference"``, which has all of them.
    The CPU backward is bitwise reproducible, the CUDA and Triton ones under
    ``torch.use_deterministic_algorithms(True)``. Under autocast, value is cast to the autocast dtype and locations and
    weights to float32.

    Example:
        >>> shapes = [(8, 8), (4, 4)]
        >>> value = torch.randn(1, 80, 2, 16)
        >>> locations, weights = torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
        >>> vitkern.ms_deform_attn(value, shapes, None, locations, weights).shape
        torch.Size([1, 5, 32])
    """
    spatial_shapes, level_start_index = _as_levels(spatial_shapes, level_start_index, value.device)
    lowered = _autocast_dtype(value, sampling_locations, attention_weights)
    if lowered is not None:
        value = value.to(lowered)
        sampling_locations, attention_weights = sampling_locations.float(), attention_weights.float()

    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return ops.ms_deform_attn(*inputs, _whole_numbers(points_per_level), method, backend)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    points_per_level: Sequence[int] | None = None,
    method: str = "bilinear",
    backend: str | None = None,
) -> Tensor:
    """:func:`ms_deform_attn` with its softmax and its locations inside: what a layer has goes straight in.

    ``attention_weights = softmax(attention_logits)`` over all points of a query and head, and ``sampling_locations``
    are ``reference + offset / (width, height)``, or, from a reference box, ``centre + offset / (2 P) * size``. Neither
    ever exists in memory, forward or backward; gradients go to reference points, offsets and logits.

    Args:
        value, spatial_shapes, level_start_index: as in :func:`ms_deform_attn`.
        reference_points: ``[B or 1, Q, L or 1, 2]`` as (x, y), or ``[B or 1, Q, L or 1, 4]`` as boxes (x, y, width,
            height) round a centre, in units of the level's size. An axis of 1 is shared by all images, or all levels.
        sampling_offsets: ``[B, Q, M, L, P, 2]``: in pixels of the level; from boxes, in P-ths of half the box.
        attention_logits: ``[B, Q, M, L * P]``.
        points_per_level: as in :func:`ms_deform_attn`: offsets are then ``[B, Q, M, K, 2]``, logits ``[B, Q, M, K]``,
            and P is the level's own number of points.
        method, backend: as in :func:`ms_deform_attn`.

    Returns:
        ``[B, Q, M * D]`` in value's dtype.

    Offsets and logits may be float16 or bfloat16: they are widened before anything is computed, so that locations and
    softmax are float32 (float64 for float64 values) throughout. Under autocast, value is cast to the autocast dtype and
    the others stay what they are. All else is as in :func:`ms_deform_attn`.

    Example:
        >>> shapes = [(8, 8), (4, 4)]
        >>> value, reference_points = torch.randn(1, 80, 2, 16), torch.rand(1, 5, 1, 2)
        >>> offsets, logits = torch.randn(1, 5, 2, 2, 4, 2), torch.randn(1, 5, 2, 8)
        >>> vitkern.ms_deform_attn_fused(value, shapes, None, reference_points, offsets, logits).shape
        torch.Size([1, 5, 32])
    """
    spatial_shapes, level_start_index = _as_levels(spatial_shapes, level_start_index, value.device)
    lowered = _autocast_dtype(value, reference_points, sampling_offsets, attention_logits)
    if lowered is not None:
        value = value.to(lowered)

    inputs = (value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits)
    return ops.ms_deform_attn_fused(*inputs, _whole_numbers(points_per_level), method, backend)


def _as_levels(
    spatial_shapes: Tensor | Sequence[tuple[int, int]], level_start_index: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Shapes and first pixels of the levels as int64 tensors, without reading any element on the host."""
    if not isinstance(spatial_shapes, Tensor):
        # Tensors made while something traces (dynamo, fake tensors, torch.func) belong to that trace alone.
        make = _cached_levels if direct.nothing_traces() else _make_levels
        shapes, starts = make(tuple((int(h), int(w)) for h, w in spatial_shapes), device)
        return shapes, starts if level_start_index is None else level_start_index.long()
    spatial_shapes = spatial_shapes.long()
    if level_start_index is None:
        pixels = spatial_shapes.prod(-1)
        return spatial_shapes, pixels.cumsum(0) - pixels
    return spatial_shapes, level_start_index.long()


def _make_levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    starts, first = [], 0
    for height, width in shapes:
        starts.append(first)
        first += height * width
    with torch.inference_mode(
        False
    ):  # a tensor made in inference mode could not be saved for a later backward
        return torch.tensor(shapes, device=device).view(-1, 2).long(), torch.tensor(
            starts, device=device
        ).long()


# Whether autocast is on for any device.
_any_autocast = torch._C._is_any_autocast_enabled

_cached_levels = functools.lru_cache(maxsize=256)(_make_levels)


def _whole_numbers(points_per_level: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if points_per_level is None else tuple(index(points) for points in points_per_level)


def _autocast_dtype(value: Tensor, *others: Tensor) -> torch.dtype | None:
    """What autocast asks value to be, or None: it is off, or has no say over float64 and integers."""
    if not _any_autocast():
        return None
    device_type = value.device.type
    if not (_knows_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    if value.dtype == torch.float64 or not all(t.is_floating_point() for t in (value, *others)):
        return None
    return torch.get_autocast_dtype(device_type)


@torch.compiler.assume_constant_result  # torch 2.4 cannot trace the question
def _knows_autocast(device_type: str) -> bool:
    """Asking a device type without autocast ("meta", others in older releases) for its state would raise."""
    return torch.amp.is_autocast_available(device_type)
