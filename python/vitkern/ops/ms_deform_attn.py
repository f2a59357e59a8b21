# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.ms_deform_attn and ms_deform_attn_fused: their plans, launches and gradients.

The public, documented functions are in ``vitkern.functional``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitkern import _C, reference
from vitkern.ops import fast_path, native
from vitkern.ops.levels import check_levels
from vitkern.ops.ms_deform_attn_checks import Attention, Fused, Plain, check, points_of
from vitkern.ops.op import Op
from vitkern.ops.plain import accumulated
from vitkern.ops.plan import Gradients, Needed, Outputs, Plan, Spec


def _coordinate_dtype(inputs: Attention) -> torch.dtype:
    """The dtype in which kernels read locations and weights: value's, or float32 or float64."""
    if inputs.locations.dtype == inputs.weights.dtype == inputs.value.dtype:
        return inputs.value.dtype
    return native.accumulator(inputs.value.dtype)


def _dtypes(inputs: Attention) -> dict[str, torch.dtype]:
    tables = dict.fromkeys(("spatial_shapes", "level_start_index"), torch.int64)
    names = "sampling_locations", "attention_weights", "sampling_offsets", "attention_logits"
    return {
        **tables,
        **dict.fromkeys(names, _coordinate_dtype(inputs)),
        "reference_points": native.accumulator(inputs.value.dtype),
    }


def _limits(backend: str, inputs: Attention) -> str | None:
    """Why sizes exceed the kernels' limits, such as 32-bit indices, or None."""
    value, locations = inputs.value, inputs.locations
    pixels, heads, levels = value.shape[1], value.shape[2], inputs.spatial_shapes.shape[0]
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


def _plan(backend: str, inputs: Attention, outputs: Sequence[Spec]) -> Plan:
    plan = kernels(backend, inputs, outputs)
    if not (inputs.value.is_cpu and backend == "cpu"):
        plan = _validated(inputs, plan)
    if isinstance(inputs, Plain):
        return plan
    shape, points = inputs.reference_points.shape, points_of(inputs)

    def backward(needed: Needed, grad_output: Tensor, *tensors: Tensor) -> Gradients:
        gradients = list(plan.backward(needed, grad_output, *tensors))
        if gradients[1] is not None:
            gradients[1] = _gradient_of_reference(gradients[1], tensors[4], shape, points)
        return gradients

    return Plan(plan.forward, backward)


def kernels(backend: str, inputs: Attention, outputs: Sequence[Spec], *, checks_levels: bool = True) -> Plan:
    """The plan for contiguous tensors. Its gradient of reference points is that of the locations computed from them."""
    if backend == "triton":
        from vitkern.ops import triton_ms_deform_attn as triton

        return triton.plan(inputs)
    value, locations, weights = inputs.value, inputs.locations, inputs.weights
    fused, on_gpu = isinstance(inputs, Fused), backend == "cuda"
    host, total = native.host(backend, value.device), native.accumulator(value.dtype)
    coordinates = _coordinate_dtype(inputs)
    options: _C.AttentionOptions = {
        "fused": fused,
        "points_per_level": points_of(inputs),
        "method": inputs.method,
        "checks_levels": checks_levels,
    }
    gradients = native.specs(
        value.dtype,
        (value.shape, total, True) if on_gpu else (value.shape, value.dtype),  # atomics add to zeros
        *[(locations.shape, total)] * fused,
        (locations.shape, coordinates),
        (weights.shape, total if on_gpu and fused else coordinates),  # all of (6) is kept here until (11)
    )
    forward = host.ms_deform_attn_forward(native.specs(value.dtype, *outputs), **options)
    backward: Callable[..., Gradients] = host.ms_deform_attn_backward(gradients, **options)
    if on_gpu:
        backward = _reproducible(host, backward, inputs, options)
    return Plan(forward, backward)


def _reproducible(
    host: _C.Host, backward: Callable[..., Gradients], inputs: Attention, options: _C.AttentionOptions
) -> Callable[..., Gradients]:
    """The backward pass under torch.use_deterministic_algorithms: sorts points by pixel, then sums them."""
    value, weights, fused = inputs.value, inputs.weights, isinstance(inputs, Fused)
    batch, pixels, heads, _ = value.shape
    total = native.accumulator(value.dtype)
    # Largest logit and 1 / total of each image, query and head.
    softmax = [((*weights.shape[:3], 2), total)] * fused
    cells = host.ms_deform_attn_cells([((weights.numel(),), torch.int64), *softmax], **options)
    gather = host.ms_deform_attn_gather_grad_value([(value.shape, total)], **options)

    def run(needed: Needed, grad_output: Tensor, *tensors: Tensor) -> Gradients:
        if not (needed[0] and torch.are_deterministic_algorithms_enabled()):
            return backward(needed, grad_output, *tensors)
        others = (False, *needed[1:])
        found = backward(others, grad_output, *tensors) if any(others) else [None] * len(needed)
        filed, *softmax = cells(*tensors) if fused else (cells(*tensors),)
        order, first = sort_by_cell(filed, batch * pixels * heads)
        return [gather(grad_output, order, first, *softmax, *tensors), *found[1:]]

    return run


def sort_by_cell(cells: Tensor, cell_bound: int) -> tuple[Tensor, Tensor]:
    """Sampling points in the order of their cells, and the first point of each cell."""
    sorted_cells, order = torch.sort(cells, stable=True)
    first = torch.searchsorted(sorted_cells, torch.arange(cell_bound + 1, device=cells.device))
    return order, first


def _op_of(inputs: Attention) -> str:
    return "ms_deform_attn_fused" if isinstance(inputs, Fused) else "ms_deform_attn"


def _validated(inputs: Attention, plan: Plan) -> Plan:
    """The plan with a check of the levels before it, for kernels without one."""
    op = _op_of(inputs)

    def forward(*tensors: Tensor) -> Outputs:
        check_levels(op, *tensors[:3])
        return plan.forward(*tensors)

    def backward(needed: Needed, grad_output: Tensor, *tensors: Tensor) -> Gradients:
        check_levels(op, *tensors[:3])
        return plan.backward(needed, grad_output, *tensors)

    return Plan(forward, backward)


def _gradient_of_reference(
    grad_computed: Tensor, offsets: Tensor, shape: torch.Size, points: tuple[int, ...]
) -> Tensor:
    """Eq. (12): the gradients of all locations from a reference point, [B, Q, M, K, 2], summed to its shape."""
    if not points:
        return grad_computed.new_zeros(shape)
    if len(set(points)) == 1 and shape[-1] == 2:
        batch, queries, heads = grad_computed.shape[:3]
        of_points = grad_computed.view(batch, queries, heads, len(points), points[0], 2)
        shared = [axis for axis, size in ((0, shape[0]), (3, shape[2])) if size == 1]
        return of_points.sum((2, 4, *shared)).view(shape)
    grad_computed, offsets = grad_computed.flatten(3, -2), offsets.flatten(3, -2)
    levels = grad_computed.sum(2).split(points, -2)  # L times [B, Q, P, 2]
    gradient = torch.stack([level.sum(-2) for level in levels], -2)
    if shape[-1] == 4:
        # The offset of a location without a contribution may not be finite: its gradient is 0, and its share must be 0.
        moved = torch.where(grad_computed == 0, 0, grad_computed * offsets)
        levels = moved.sum(2).split(points, -2)
        shares = [level.sum(-2) / (2 * max(count, 1)) for level, count in zip(levels, points)]
        gradient = torch.cat([gradient, torch.stack(shares, -2)], -1)
    return gradient.sum_to_size(shape)


def _reference(inputs: Attention) -> Tensor:
    """The same function in plain torch, for backend="reference": differentiable any number of times."""
    value, shapes, starts, *tensors = (each for each in inputs if isinstance(each, Tensor))
    if fast_path.nothing_traces():  # a trace may have no elements to read
        check_levels(_op_of(inputs), value, shapes, starts)
    points, method = points_of(inputs), inputs.method
    formula: Callable[..., Tensor] = reference.ms_deform_attn
    if isinstance(inputs, Fused):
        formula = reference.ms_deform_attn_fused

    def flat(value: Tensor, *tensors: Tensor) -> Tensor:
        *reference_points, locations, weights = tensors
        flattened = locations.flatten(3, -2), weights.flatten(3)
        return formula(value, shapes, starts, *reference_points, *flattened, points, method)

    return accumulated(flat, value, *tensors)


def _flops(value: torch.Size, locations: torch.Size) -> int:
    """The operations for [B, S, M, D] and [B, Q, M, ..., 2]: each point blends four pixels, D channels each."""
    return 2 * 4 * value[-1] * math.prod(locations[:-1])


ms_deform_attn = Op(
    "ms_deform_attn",
    Plain,
    differentiable=("value", "sampling_locations", "attention_weights"),
    check=check,
    plan=_plan,
    limits=_limits,
    dtypes=_dtypes,
    reference=_reference,
    flops=lambda value, shapes, starts, locations, *_: _flops(value, locations),
)

ms_deform_attn_fused = Op(
    "ms_deform_attn_fused",
    Fused,
    differentiable=("value", "reference_points", "sampling_offsets", "attention_logits"),
    check=check,
    plan=_plan,
    limits=_limits,
    dtypes=_dtypes,
    reference=_reference,
    flops=lambda value, shapes, starts, points, offsets, *_: _flops(value, offsets),
)
