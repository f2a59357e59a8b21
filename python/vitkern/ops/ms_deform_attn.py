# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.ms_deform_attn and ms_deform_attn_fused: what they ask of their arguments, and their launches.

The public, documented functions are in ``vitkern.functional``. Points of unequal levels arrive flattened: [..., K, 2]
with ``points_per_level``; uniform ones as [..., L, P, 2] without.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vitkern import backends, reference
from vitkern.ops import direct, native
from vitkern.ops.op import BACKEND, Op, kernel

_OPTIONS = f"int[]? points_per_level=None, str method='bilinear', {BACKEND}"
_DEFAULTS = (None, "bilinear", None)
_VALIDATE_ON_DEVICE = "VITKERN_VALIDATE"


class _Contract:
    """The checks of one of the two ops, whose messages name it and its arguments."""

    def __init__(self, op: str, locations: str, weights: str) -> None:
        self.op, self.locations, self.weights = op, locations, weights

    def fail(self, argument: str, expected: str, got: object) -> None:
        raise ValueError(f"{self.op}: {argument} must be {expected}, got {got}")

    def check_value(self, value, spatial_shapes, level_start_index, method) -> None:
        if value.dim() != 4:
            self.fail("value", "[B, S, M, D]", list(value.shape))
        if value.dtype not in backends.DTYPES:
            raise TypeError(
                f"{self.op}: value must be float32, float64, float16 or bfloat16, got {value.dtype}"
            )
        if method not in native.SAMPLING_CODES:
            self.fail("method", "'bilinear' or 'nearest'", repr(method))
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            self.fail("spatial_shapes", "[L, 2] as (height, width)", list(spatial_shapes.shape))
        levels = spatial_shapes.shape[0]
        if level_start_index.shape != (levels,):
            self.fail("level_start_index", f"[L] with L={levels}", list(level_start_index.shape))
        for name, tensor in (("spatial_shapes", spatial_shapes), ("level_start_index", level_start_index)):
            if tensor.dtype != torch.int64:
                raise TypeError(f"{self.op}: {name} must be int64, got {tensor.dtype}")
            self.check_device(name, tensor, value)

    def check_locations(self, value, spatial_shapes, locations, points_per_level) -> tuple[int, ...]:
        """What follows [B, Q, M] in the shape of the locations: (L, P), or (K,) with points_per_level."""
        levels, (batch, _, heads, _), shape = spatial_shapes.shape[0], value.shape, locations.shape
        if points_per_level is None:
            form, points = f"[B, Q, M, L, P, 2] with B={batch}, M={heads}, L={levels}", (levels, *shape[4:5])
        else:
            if len(points_per_level) != levels or min(points_per_level, default=0) < 0:
                self.fail("points_per_level", f"L={levels} numbers of at least 0", list(points_per_level))
            points = (sum(points_per_level),)
            form = f"[B, Q, M, K, 2] with B={batch}, M={heads}, K={points[0]} points in all"
        if shape != (batch, *shape[1:2], heads, *points, 2):
            self.fail(self.locations, form, list(shape))
        self.check_floating(self.locations, locations, value)
        return points

    def check_weights(self, value, weights, expected) -> None:
        if weights.shape != expected:
            self.fail(self.weights, f"{list(expected)}, like {self.locations}", list(weights.shape))
        self.check_floating(self.weights, weights, value)

    def check_floating(self, name, tensor, value) -> None:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{self.op}: {name} must be floating point, got {tensor.dtype}")
        self.check_device(name, tensor, value)

    def check_device(self, name, tensor, value) -> None:
        if tensor.device != value.device:
            self.fail(name, f"on value's device {value.device}", tensor.device)

    def check_levels(self, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> None:
        """That the levels tile the S pixels. Reads elements: on a GPU, where that waits, only if VITKERN_VALIDATE=1."""
        if value.device.type != "cpu" and os.environ.get(_VALIDATE_ON_DEVICE) != "1":
            return
        shapes, starts, pixels = spatial_shapes.tolist(), level_start_index.tolist(), value.shape[1]
        covered = 0
        for start, (height, width) in sorted(zip(starts, shapes)):
            if height < 0 or width < 0:
                self.fail("spatial_shapes", "of sizes of at least 0", shapes)
            if height * width == 0:
                continue
            if start != covered:
                expected = f"the first pixel of each level of {shapes}, without gap or overlap"
                self.fail("level_start_index", expected, starts)
            covered += height * width
        if covered != pixels:
            expected = f"the sizes of levels with S={pixels} pixels in all, as value"
            self.fail("spatial_shapes", expected, f"{shapes}: {covered}")


_PLAIN = _Contract("ms_deform_attn", "sampling_locations", "attention_weights")
_FUSED = _Contract("ms_deform_attn_fused", "sampling_offsets", "attention_logits")


def _check_plain(
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    points_per_level,
    method,
    _,
) -> tuple[int, int, int]:
    _PLAIN.check_value(value, spatial_shapes, level_start_index, method)
    points = _PLAIN.check_locations(value, spatial_shapes, sampling_locations, points_per_level)
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    _PLAIN.check_weights(value, attention_weights, (batch, queries, heads, *points))
    return batch, queries, heads * channels


def _check_fused(
    value,
    spatial_shapes,
    level_start_index,
    reference_points,
    sampling_offsets,
    attention_logits,
    points_per_level,
    method,
    _,
) -> tuple[int, int, int]:
    _FUSED.check_value(value, spatial_shapes, level_start_index, method)
    points = _FUSED.check_locations(value, spatial_shapes, sampling_offsets, points_per_level)
    batch, _, heads, channels = value.shape
    queries, levels, total = sampling_offsets.shape[1], spatial_shapes.shape[0], torch.Size(points).numel()
    _FUSED.check_weights(value, attention_logits, (batch, queries, heads, total))
    shape = reference_points.shape
    fits = len(shape) == 4 and shape[1] == queries and shape[3] in (2, 4)
    if not (fits and shape[0] in (1, batch) and shape[2] in (1, levels)):
        expected = f"[B or 1, Q, L or 1, 2 or 4] with B={batch}, Q={queries}, L={levels}"
        _FUSED.fail("reference_points", expected, list(shape))
    _FUSED.check_floating("reference_points", reference_points, value)
    return batch, queries, heads * channels


def _points_per_level(locations: Tensor, points_per_level) -> tuple[int, ...]:
    if points_per_level is not None:
        return tuple(points_per_level)
    return (locations.shape[4],) * locations.shape[3]


def _flat(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Locations [B, Q, M, K, 2] and weights [B, Q, M, K] in one dtype that the kernels read: value's or fp32 / fp64."""
    dtype = locations.dtype
    if dtype != weights.dtype or dtype != value.dtype:
        dtype = native.accumulator(value.dtype)
    batch, queries, heads = locations.shape[:3]
    points = weights.shape[3:].numel()
    locations = locations.to(dtype).contiguous().view(batch, queries, heads, points, 2)
    return locations, weights.to(dtype).contiguous().view(batch, queries, heads, points)


def _launch_plain(
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    points_per_level,
    method,
    backend,
):
    """The backend, and what its launch functions take: checked, contiguous, points flattened."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    _check_plain(*inputs, points_per_level, method, backend)
    _PLAIN.check_levels(value, spatial_shapes, level_start_index)
    points = _points_per_level(sampling_locations, points_per_level)
    tables = spatial_shapes.contiguous(), level_start_index.contiguous()
    coordinates = _flat(value, sampling_locations, attention_weights)
    backend = backends.choose(value.device, value.dtype, backend)
    return backend, (value.contiguous(), *tables, *coordinates, points, method)


def _launch_fused(
    value,
    spatial_shapes,
    level_start_index,
    reference_points,
    offsets,
    logits,
    points_per_level,
    method,
    backend,
):
    inputs = (value, spatial_shapes, level_start_index, reference_points, offsets, logits)
    _check_fused(*inputs, points_per_level, method, backend)
    _FUSED.check_levels(value, spatial_shapes, level_start_index)
    points = _points_per_level(offsets, points_per_level)
    tables = spatial_shapes.contiguous(), level_start_index.contiguous()
    coordinates = _flat(value, offsets, logits)
    places = reference_points.to(native.accumulator(value.dtype)).contiguous()
    backend = backends.choose(value.device, value.dtype, backend)
    return backend, (value.contiguous(), *tables, *coordinates, points, method, places)


def _forward_plain(*inputs):
    backend, arguments = _launch_plain(*inputs)
    return kernel("ms_deform_attn_forward", backend)(*arguments)


def _forward_fused(*inputs):
    backend, arguments = _launch_fused(*inputs)
    return kernel("ms_deform_attn_forward", backend)(*arguments)


def _backward(backend, grad_output, needed, arguments):
    deterministic = torch.are_deterministic_algorithms_enabled()
    launch = kernel("ms_deform_attn_backward", backend)
    return launch(grad_output, needed, *arguments, deterministic=deterministic)


def _backward_plain(grad_output, needed, *inputs):
    backend, arguments = _launch_plain(*inputs)
    return _backward(backend, grad_output, needed, arguments)


def _backward_fused(grad_output, needed, *inputs):
    backend, arguments = _launch_fused(*inputs)
    needs_value, needs_reference, needs_offsets, needs_logits = needed
    launched = (needs_value, needs_offsets, needs_logits, needs_reference)
    grad_value, grad_offsets, grad_logits, grad_places = _backward(backend, grad_output, launched, arguments)
    grad_reference = None
    if needs_reference:
        call = native.MsDeformAttnCall(*arguments)
        grad_reference = _gradient_of_reference(grad_places, call, reference_points=arguments[-1])
    return grad_value, grad_reference, grad_offsets, grad_logits


def _gradient_of_reference(
    grad_places: Tensor, call: native.MsDeformAttnCall, reference_points: Tensor
) -> Tensor:
    """Eq. (12): the gradients of all places that came of a reference point, [B, Q, M, K, 2], summed to its shape."""
    points, shape = call.points_per_level, reference_points.shape
    if not points:
        return grad_places.new_zeros(shape)
    levels = grad_places.sum(2).split(points, -2)  # L times [B, Q, P, 2]
    gradient = torch.stack([level.sum(-2) for level in levels], -2)
    if shape[-1] == 4:
        # A place that adds nothing may have an offset that is not finite: its gradient is 0, and so is its share.
        moved = torch.where(grad_places == 0, 0, grad_places * call.locations)
        levels = moved.sum(2).split(points, -2)
        shares = [level.sum(-2) / (2 * max(count, 1)) for level, count in zip(levels, points)]
        gradient = torch.cat([gradient, torch.stack(shares, -2)], -1)
    return gradient.sum_to_size(shape)


ms_deform_attn = Op(
    "ms_deform_attn",
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
    f"Tensor attention_weights, {_OPTIONS}",
    defaults=_DEFAULTS,
    differentiable=(0, 3, 4),
    check=_check_plain,
    forward=_forward_plain,
    backward=_backward_plain,
)

ms_deform_attn_fused = Op(
    "ms_deform_attn_fused",
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, "
    f"Tensor sampling_offsets, Tensor attention_logits, {_OPTIONS}",
    defaults=_DEFAULTS,
    differentiable=(0, 3, 4, 5),
    check=_check_fused,
    forward=_forward_fused,
    backward=_backward_fused,
)


def ms_deform_attn_by_reference(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points_per_level, method
):
    """The same function as plain torch code, for backend="reference": differentiable any number of times."""
    tables = (value, spatial_shapes, level_start_index)
    _check_plain(*tables, sampling_locations, attention_weights, points_per_level, method, None)
    if direct.nothing_traces():  # else there may be no elements to read
        _PLAIN.check_levels(*tables)
    points = _points_per_level(sampling_locations, points_per_level)
    return reference.ms_deform_attn(
        *tables, *_flat(value, sampling_locations, attention_weights), points, method
    )


def ms_deform_attn_fused_by_reference(
    value, spatial_shapes, level_start_index, reference_points, offsets, logits, points_per_level, method
):
    tables = (value, spatial_shapes, level_start_index)
    _check_fused(*tables, reference_points, offsets, logits, points_per_level, method, None)
    if direct.nothing_traces():
        _FUSED.check_levels(*tables)
    points = _points_per_level(offsets, points_per_level)
    coordinates = _flat(value, offsets, logits)
    return reference.ms_deform_attn_fused(*tables, reference_points, *coordinates, points, method)
