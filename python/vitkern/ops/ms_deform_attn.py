# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.ms_deform_attn and ms_deform_attn_fused: their plans, launches and gradients.

The public, documented functions are in ``vitkern.functional``. Points of unequal levels arrive flattened: [..., K, 2]
with ``points_per_level``; uniform ones as [..., L, P, 2] without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern import _C, reference
from vitkern.ops import fast_path, native
from vitkern.ops.derivative import Spec
from vitkern.ops.levels import check_levels
from vitkern.ops.ms_deform_attn_checks import check_fused, check_plain
from vitkern.ops.op import BACKEND, Op, Plan
from vitkern.ops.plain import accumulated

_OPTIONS = f"int[]? points_per_level=None, str method='bilinear', {BACKEND}"
_DEFAULTS = (None, "bilinear", None)
_TABLES = {1: torch.int64, 2: torch.int64}  # of the levels: positions and dtype


def _points_per_level(locations: Tensor, points_per_level: Sequence[int] | None) -> tuple[int, ...]:
    if points_per_level is not None:
        return tuple(points_per_level)
    return (locations.shape[4],) * locations.shape[3]


def _coordinate_dtype(value: Tensor, locations: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype that kernels read locations and weights in: value's, or float32 or float64."""
    if locations.dtype == weights.dtype == value.dtype:
        return value.dtype
    return native.accumulator(value.dtype)


def _limits(backend: str, value: Tensor, shapes: Tensor, starts: Tensor, *others: Tensor) -> str | None:
    """The kernels count in 32 bits."""
    locations = others[-2]
    pixels, heads, levels = value.shape[1], value.shape[2], shapes.shape[0]
    rows = max(locations.shape[1], pixels) * heads
    if backend in ("cpu", "cuda") and pixels >= 2**31:
        return f"value must have fewer than 2^31 pixels, got {pixels}"
    if backend != "cuda":
        return None
    most_levels = 512 if value.dtype == torch.float64 else 1024
    if levels > most_levels:
        return f"spatial_shapes must be of at most {most_levels} levels in {value.dtype}, got {levels}"
    if rows >= 2**31:
        return f"queries, or pixels, times heads must be fewer than 2^31, got {rows}"
    points = locations.shape[3:-1].numel()
    return f"points must be at most 2^20 a query and head, got {points}" if points > 2**20 else None


def _dtypes_plain(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> dict[int, torch.dtype]:
    coordinates = _coordinate_dtype(value, locations, weights)
    return _TABLES | {3: coordinates, 4: coordinates}


def _dtypes_fused(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> dict[int, torch.dtype]:
    coordinates = _coordinate_dtype(value, offsets, logits)
    return _TABLES | {3: native.accumulator(value.dtype), 4: coordinates, 5: coordinates}


def _plan_plain(backend: str, *inputs: Any) -> Plan:
    *tensors, points_per_level, method, _ = inputs
    value, _, _, locations, weights = tensors
    points = _points_per_level(locations, points_per_level)
    plan = kernels(backend, tensors, points, method, check_plain(*inputs))
    return plan if value.is_cpu and backend == "cpu" else _validated("ms_deform_attn", plan)


def _plan_fused(backend: str, *inputs: Any) -> Plan:
    *tensors, points_per_level, method, _ = inputs
    value, _, _, reference_points, offsets, _ = tensors
    points = _points_per_level(offsets, points_per_level)
    plan = kernels(backend, tensors, points, method, check_fused(*inputs))
    if not (value.is_cpu and backend == "cpu"):
        plan = _validated("ms_deform_attn_fused", plan)

    def backward(needed: tuple[bool, ...], grad_output: Tensor, *tensors: Any) -> list[Tensor | None]:
        gradients = list(plan.backward(needed, grad_output, *tensors))
        if gradients[1] is not None:
            gradients[1] = _gradient_of_reference(gradients[1], tensors[4], reference_points.shape, points)
        return gradients

    return Plan(plan.forward, backward)


def kernels(
    backend: str,
    tensors: Sequence[Tensor],
    points: tuple[int, ...],
    method: str,
    outputs: Sequence[Spec],
    checks_levels: bool = True,
) -> Plan:
    """The plan for contiguous tensors. Its gradient of reference points is that of the places that they lead to."""
    if backend == "triton":
        from vitkern.ops import triton_ms_deform_attn as triton

        return triton.plan(points, method)
    value, fused = tensors[0], len(tensors) == 6
    options: dict[str, Any] = {"fused": fused, "points_per_level": points, "method": method}
    options["checks_levels"] = checks_levels
    host, total = native.host(backend, value.device), native.accumulator(value.dtype)
    locations, weights = tensors[-2:]
    coordinates = _coordinate_dtype(value, locations, weights)
    on_gpu = backend == "cuda"
    gradients = native.specs(
        value.dtype,
        (value.shape, total, True) if on_gpu else (value.shape, value.dtype),  # atomics add to zeros
        *[(locations.shape, total)] * fused,
        (locations.shape, coordinates),
        (weights.shape, total if on_gpu and fused else coordinates),  # where (6) of all points waits for (11)
    )
    forward = host.ms_deform_attn_forward(native.specs(value.dtype, *outputs), **options)
    backward: Callable[..., Sequence[Tensor | None]] = host.ms_deform_attn_backward(gradients, **options)
    if on_gpu:
        backward = _reproducible(host, backward, tensors, gradients, options)
    return Plan(forward, backward)


def _reproducible(
    host: _C.Host,
    backward: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor],
    gradients: Sequence[Any],
    options: dict[str, Any],
) -> Callable[..., Sequence[Tensor | None]]:
    """The backward pass that torch.use_deterministic_algorithms asks for: points sorted by pixel, then summed."""
    value, weights, fused = tensors[0], tensors[-1], options["fused"]
    batch, pixels, heads, _ = value.shape
    total = native.accumulator(value.dtype)
    # Greatest logit and 1 / sum of each image, query and head.
    softmax = [((*weights.shape[:3], 2), total)] * fused
    cells = host.ms_deform_attn_cells([((weights.numel(),), torch.int64), *softmax], **options)
    gather = host.ms_deform_attn_gather_grad_value([(value.shape, total)], **options)

    def run(needed: tuple[bool, ...], grad_output: Tensor, *tensors: Any) -> Sequence[Tensor | None]:
        if not (needed[0] and torch.are_deterministic_algorithms_enabled()):
            return backward(needed, grad_output, *tensors)
        others = (False, *needed[1:])
        found = backward(others, grad_output, *tensors) if any(others) else [None] * len(gradients)
        filed, *softmax = cells(*tensors) if fused else (cells(*tensors),)
        order, first = sort_by_cell(filed, batch * pixels * heads)
        return [gather(grad_output, order, first, *softmax, *tensors), *found[1:]]

    return run


def sort_by_cell(cells: Tensor, cell_bound: int) -> tuple[Tensor, Tensor]:
    """Sampling points in the order of the cells they fall in, and where each cell's points begin."""
    sorted_cells, order = torch.sort(cells, stable=True)
    first = torch.searchsorted(sorted_cells, torch.arange(cell_bound + 1, device=cells.device))
    return order, first


def _validated(op: str, plan: Plan) -> Plan:
    """With a look at the levels before, where no kernel takes one."""

    def forward(*tensors: Any) -> Tensor:
        check_levels(op, *tensors[:3])
        output: Tensor = plan.forward(*tensors)
        return output

    def backward(needed: tuple[bool, ...], grad_output: Tensor, *tensors: Any) -> Sequence[Tensor | None]:
        check_levels(op, *tensors[:3])
        return plan.backward(needed, grad_output, *tensors)

    return Plan(forward, backward)


def _gradient_of_reference(
    grad_places: Tensor, offsets: Tensor, shape: torch.Size, points: tuple[int, ...]
) -> Tensor:
    """Eq. (12): the gradients of all places that came of a reference point, [B, Q, M, K, 2], summed to its shape."""
    if not points:
        return grad_places.new_zeros(shape)
    if len(set(points)) == 1 and shape[-1] == 2:
        batch, queries, heads = grad_places.shape[:3]
        of_points = grad_places.view(batch, queries, heads, len(points), points[0], 2)
        shared = [axis for axis, size in ((0, shape[0]), (3, shape[2])) if size == 1]
        return of_points.sum((2, 4, *shared)).view(shape)
    grad_places, offsets = grad_places.flatten(3, -2), offsets.flatten(3, -2)
    levels = grad_places.sum(2).split(points, -2)  # L times [B, Q, P, 2]
    gradient = torch.stack([level.sum(-2) for level in levels], -2)
    if shape[-1] == 4:
        # A place that adds nothing may have an offset that is not finite: its gradient is 0, and so is its share.
        moved = torch.where(grad_places == 0, 0, grad_places * offsets)
        levels = moved.sum(2).split(points, -2)
        shares = [level.sum(-2) / (2 * max(count, 1)) for level, count in zip(levels, points)]
        gradient = torch.cat([gradient, torch.stack(shares, -2)], -1)
    return gradient.sum_to_size(shape)


def _reference_plain(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    points_per_level: Sequence[int] | None,
    method: str,
) -> Tensor:
    """The same function as plain torch code, for backend="reference": differentiable any number of times."""
    if fast_path.nothing_traces():  # else there may be no elements to read
        check_levels("ms_deform_attn", value, shapes, starts)
    points = _points_per_level(locations, points_per_level)

    def formula(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        flat = locations.flatten(3, -2), weights.flatten(3)
        return reference.ms_deform_attn(value, shapes, starts, *flat, points, method)

    return accumulated(formula, value, locations, weights)


def _reference_fused(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    points_per_level: Sequence[int] | None,
    method: str,
) -> Tensor:
    if fast_path.nothing_traces():
        check_levels("ms_deform_attn_fused", value, shapes, starts)
    points = _points_per_level(offsets, points_per_level)

    def formula(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
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
    limits=_limits,
    dtypes=_dtypes_plain,
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
    limits=_limits,
    dtypes=_dtypes_fused,
    reference=_reference_fused,
)
