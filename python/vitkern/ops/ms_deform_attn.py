# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.ms_deform_attn and ms_deform_attn_fused: their plans, launches and gradients.

The public, documented functions are in ``vitkern.functional``. Points of unequal levels arrive flattened: [..., K, 2]
with ``points_per_level``; uniform ones as [..., L, P, 2] without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitkern import reference
from vitkern.ops import direct, native
from vitkern.ops.ms_deform_attn_checks import FUSED, PLAIN, MsDeformAttnContract, check_fused, check_plain
from vitkern.ops.op import BACKEND, Op, kernel
from vitkern.ops.plain import accumulated

_OPTIONS = f"int[]? points_per_level=None, str method='bilinear', {BACKEND}"
_DEFAULTS = (None, "bilinear", None)


class MsDeformAttnCall(NamedTuple):
    """What the kernels are launched on: contiguous, checked, coordinates in one dtype."""

    value: Tensor  # [B, S, M, D]
    spatial_shapes: Tensor  # [L, 2]
    level_start_index: Tensor  # [L]
    locations: Tensor  # [B, Q, M, K, 2] or [B, Q, M, L, P, 2]; in the fused form, offsets
    weights: Tensor  # [B, Q, M, K] or [B, Q, M, L, P]; in the fused form, logits
    points_per_level: tuple[int, ...]
    method: str = "bilinear"
    reference_points: Tensor | None = None  # [B | 1, Q, L | 1, 2 | 4], accumulator's dtype: the fused form

    @property
    def sizes(self) -> tuple[int, ...]:
        """B, S, M, D, Q, L, K."""
        points = self.points_per_level
        return (*self.value.shape, self.weights.shape[1], len(points), sum(points))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the ops' arguments."""
        anchors = () if self.reference_points is None else (self.reference_points,)
        return *self[:3], *anchors, self.locations, self.weights


class _Plan(NamedTuple):
    """What follows from shapes, dtypes, device and options: see Op."""

    contract: MsDeformAttnContract
    launch_backward: Callable[..., list[Tensor | None]]
    coordinates: torch.dtype  # that locations and weights are read in: value's or fp32 / fp64
    accumulator: torch.dtype
    points_per_level: tuple[int, ...]
    method: str
    forward: Callable[..., Tensor] | None = None  # of the op's tensors

    def call(self, value: Tensor, shapes: Tensor, starts: Tensor, *others: Tensor) -> MsDeformAttnCall:
        *reference_points, locations, weights = others
        return MsDeformAttnCall(
            value.contiguous(),
            shapes.contiguous(),
            starts.contiguous(),
            _as(self.coordinates, locations),
            _as(self.coordinates, weights),
            self.points_per_level,
            self.method,
            *(_as(self.accumulator, points) for points in reference_points),
        )


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _points_per_level(locations: Tensor, points_per_level) -> tuple[int, ...]:
    if points_per_level is not None:
        return tuple(points_per_level)
    return (locations.shape[4],) * locations.shape[3]


def _coordinate_dtype(value: Tensor, locations: Tensor, weights: Tensor) -> torch.dtype:
    if locations.dtype == weights.dtype == value.dtype:
        return value.dtype
    return native.accumulator(value.dtype)


def _plan(contract, backend, value, *tensors, points_per_level, method) -> _Plan:
    locations, weights = tensors[-2:]
    plan = _Plan(
        contract,
        kernel("ms_deform_attn", "backward", backend),
        _coordinate_dtype(value, locations, weights),
        native.accumulator(value.dtype),
        _points_per_level(locations, points_per_level),
        method,
    )
    call = plan.call(value, *tensors)
    launch = kernel("ms_deform_attn", "forward", backend)(call, contract.check_levels)
    if all(ours is theirs for ours, theirs in zip(call.tensors, (value, *tensors))):
        return plan._replace(forward=launch)
    return plan._replace(forward=lambda *tensors: launch(*plan.call(*tensors).tensors))


def _plan_plain(backend, *inputs):
    *tensors, points_per_level, method, _ = inputs
    return _plan(PLAIN, backend, *tensors, points_per_level=points_per_level, method=method)


def _plan_fused(backend, *inputs):
    *tensors, points_per_level, method, _ = inputs
    return _plan(FUSED, backend, *tensors, points_per_level=points_per_level, method=method)


def _forward(plan):
    return plan.forward


def _launch_backward(plan, grad_output, needed, call):
    plan.contract.check_levels(call.value, call.spatial_shapes, call.level_start_index)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return plan.launch_backward(call, grad_output, needed, deterministic)


def _backward_plain(plan, grad_output, needed, *tensors):
    return _launch_backward(plan, grad_output, needed, plan.call(*tensors))


def _backward_fused(plan, grad_output, needed, *tensors):
    call = plan.call(*tensors)
    needs_value, needs_reference, needs_offsets, needs_logits = needed
    launched = (needs_value, needs_offsets, needs_logits, needs_reference)
    grad_value, grad_offsets, grad_logits, grad_places = _launch_backward(plan, grad_output, launched, call)
    grad_reference = None
    if needs_reference:
        grad_reference = _gradient_of_reference(grad_places, call, tensors[3].shape)
    return grad_value, grad_reference, grad_offsets, grad_logits


def _gradient_of_reference(grad_places: Tensor, call: MsDeformAttnCall, shape: torch.Size) -> Tensor:
    """Eq. (12): the gradients of all places that came of a reference point, [B, Q, M, K, 2], summed to its shape."""
    points = call.points_per_level
    if not points:
        return grad_places.new_zeros(shape)
    grad_places, offsets = grad_places.flatten(3, -2), call.locations.flatten(3, -2)
    levels = grad_places.sum(2).split(points, -2)  # L times [B, Q, P, 2]
    gradient = torch.stack([level.sum(-2) for level in levels], -2)
    if shape[-1] == 4:
        # A place that adds nothing may have an offset that is not finite: its gradient is 0, and so is its share.
        moved = torch.where(grad_places == 0, 0, grad_places * offsets)
        levels = moved.sum(2).split(points, -2)
        shares = [level.sum(-2) / (2 * max(count, 1)) for level, count in zip(levels, points)]
        gradient = torch.cat([gradient, torch.stack(shares, -2)], -1)
    return gradient.sum_to_size(shape)


def _reference_plain(value, shapes, starts, locations, weights, points_per_level, method):
    """The same function as plain torch code, for backend="reference": differentiable any number of times."""
    if direct.nothing_traces():  # else there may be no elements to read
        PLAIN.check_levels(value, shapes, starts)
    points = _points_per_level(locations, points_per_level)

    def formula(value, locations, weights):
        flat = locations.flatten(3, -2), weights.flatten(3)
        return reference.ms_deform_attn(value, shapes, starts, *flat, points, method)

    return accumulated(formula, value, locations, weights)


def _reference_fused(value, shapes, starts, reference_points, offsets, logits, points_per_level, method):
    if direct.nothing_traces():
        FUSED.check_levels(value, shapes, starts)
    points = _points_per_level(offsets, points_per_level)

    def formula(value, reference_points, offsets, logits):
        flat = reference_points, offsets.flatten(3, -2), logits.flatten(3)
        return reference.ms_deform_attn_fused(value, shapes, starts, *flat, points, method)

    return accumulated(formula, value, reference_points, offsets, logits)


ms_deform_attn = Op(
    "ms_deform_attn",
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
    f"Tensor attention_weights, {_OPTIONS}",
    defaults=_DEFAULTS,
    differentiable=(0, 3, 4),
    check=check_plain,
    plan=_plan_plain,
    forward=_forward,
    backward=_backward_plain,
    reference=_reference_plain,
)

ms_deform_attn_fused = Op(
    "ms_deform_attn_fused",
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, "
    f"Tensor sampling_offsets, Tensor attention_logits, {_OPTIONS}",
    defaults=_DEFAULTS,
    differentiable=(0, 3, 4, 5),
    check=check_fused,
    plan=_plan_fused,
    forward=_forward,
    backward=_backward_fused,
    reference=_reference_fused,
)
