# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.ms_deform_attn and its backward: schema, checks, fake implementation, autograd, choice of backend.

The public, documented function is ``vitkern.ms_deform_attn``. Points of unequal levels arrive flattened: [..., K, 2]
with ``points_per_level``; uniform ones as [..., L, P, 2] without.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vitkern import backends, reference
from vitkern.ops import direct, native

_INPUTS = (
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, int[]? points_per_level=None, str method='bilinear', str? backend=None"
)
_library = torch.library.Library("vitkern", "FRAGMENT")
_library.define(f"ms_deform_attn({_INPUTS}) -> Tensor")
_library.define(
    f"ms_deform_attn_backward(Tensor grad_output, bool[3] needed, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
)

_VALIDATE_ON_DEVICE = "VITKERN_VALIDATE"


def _fail(argument: str, expected: str, got: object) -> None:
    raise ValueError(f"ms_deform_attn: {argument} must be {expected}, got {got}")


def _check(
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    points_per_level=None,
    method="bilinear",
) -> tuple[int, int, int]:
    """The shape of the output, if all is well that can be told without reading elements: of real or fake tensors."""
    if value.dim() != 4:
        _fail("value", "[B, S, M, D]", list(value.shape))
    if value.dtype not in backends.DTYPES:
        raise TypeError(
            f"ms_deform_attn: value must be float32, float64, float16 or bfloat16, got {value.dtype}"
        )
    if method not in native.SAMPLING_CODES:
        _fail("method", "'bilinear' or 'nearest'", repr(method))
    batch, _, heads, channels = value.shape
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        _fail("spatial_shapes", "[L, 2] as (height, width)", list(spatial_shapes.shape))
    levels = spatial_shapes.shape[0]
    if level_start_index.shape != (levels,):
        _fail("level_start_index", f"[L] with L={levels}", list(level_start_index.shape))

    shape = sampling_locations.shape
    if points_per_level is None:
        form, points = f"[B, Q, M, L, P, 2] with B={batch}, M={heads}, L={levels}", (levels, *shape[4:5])
    else:
        if len(points_per_level) != levels or min(points_per_level, default=0) < 0:
            _fail("points_per_level", f"L={levels} numbers of at least 0", list(points_per_level))
        points = (sum(points_per_level),)
        form = f"[B, Q, M, K, 2] with B={batch}, M={heads}, K={points[0]} points in all"
    expected = (batch, *shape[1:2], heads, *points)
    if shape != (*expected, 2):
        _fail("sampling_locations", form, list(shape))
    if attention_weights.shape != expected:
        _fail(
            "attention_weights", f"{list(expected)}, like sampling_locations", list(attention_weights.shape)
        )
    coordinates = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    tables = {"spatial_shapes": spatial_shapes, "level_start_index": level_start_index}
    for name, tensor in coordinates.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"ms_deform_attn: {name} must be floating point, got {tensor.dtype}")
    for name, tensor in tables.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"ms_deform_attn: {name} must be int64, got {tensor.dtype}")
    for name, tensor in (tables | coordinates).items():
        if tensor.device != value.device:
            _fail(name, f"on value's device {value.device}", tensor.device)
    return batch, shape[1], heads * channels


def _check_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> None:
    """That the levels tile the S pixels. Reads the tensors: on a GPU, where that waits, only if VITKERN_VALIDATE=1."""
    if value.device.type != "cpu" and os.environ.get(_VALIDATE_ON_DEVICE) != "1":
        return
    shapes, starts, pixels = spatial_shapes.tolist(), level_start_index.tolist(), value.shape[1]
    covered = 0
    for start, (height, width) in sorted(zip(starts, shapes)):
        if height < 0 or width < 0:
            _fail("spatial_shapes", "of sizes of at least 0", shapes)
        if height * width == 0:
            continue
        if start != covered:
            _fail(
                "level_start_index",
                f"the first pixel of each level of {shapes}, without gap or overlap",
                starts,
            )
        covered += height * width
    if covered != pixels:
        _fail(
            "spatial_shapes",
            f"the sizes of levels with S={pixels} pixels in all, as value",
            f"{shapes}: {covered}",
        )


def _points_per_level(spatial_shapes: Tensor, attention_weights: Tensor, points_per_level) -> tuple[int, ...]:
    if points_per_level is not None:
        return tuple(points_per_level)
    return (attention_weights.shape[4],) * spatial_shapes.shape[0]


def _coordinates(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations [B, Q, M, K, 2] and weights [B, Q, M, K] in one dtype that the kernels read: value's or fp32 / fp64."""
    dtype = sampling_locations.dtype
    if dtype != attention_weights.dtype or dtype != value.dtype:
        dtype = native.accumulator(value.dtype)
    batch, queries, heads = sampling_locations.shape[:3]
    points = attention_weights.shape[3:].numel()
    locations = sampling_locations.to(dtype).contiguous().view(batch, queries, heads, points, 2)
    return locations, attention_weights.to(dtype).contiguous().view(batch, queries, heads, points)


def _kernel(name: str, backend: str):
    """The launch function of this name for a backend; Triton is imported when first needed."""
    if backend == "triton":
        from vitkern.ops import triton_launch

        return getattr(triton_launch, f"{name}_triton")
    if backend == "reference":
        raise RuntimeError(
            "the plain torch reference is no kernel: call vitkern.ms_deform_attn(backend='reference')"
        )
    return getattr(native, f"{name}_{backend}")


def _prepare(*inputs):
    """The backend, the output's shape, and what launch functions share: checked, contiguous, points flattened."""
    value, spatial_shapes, level_start_index, *coordinates = inputs[:5]
    # The dispatcher leaves out trailing arguments that have their default.
    points_per_level, method, backend = inputs[5:] + (None, "bilinear", None)[len(inputs) - 5 :]
    shape = _check(*inputs[:7])
    _check_levels(value, spatial_shapes, level_start_index)
    points = _points_per_level(spatial_shapes, coordinates[1], points_per_level)
    tables = spatial_shapes.contiguous(), level_start_index.contiguous()
    arguments = (value.contiguous(), *tables, *_coordinates(value, *coordinates), points, method)
    return backends.choose(value.device, value.dtype, backend), shape, arguments


def _forward(*inputs):
    backend, _, arguments = _prepare(*inputs)
    return _kernel("ms_deform_attn_forward", backend)(*arguments)


def _backward(grad_output, needed, *inputs):
    backend, shape, arguments = _prepare(*inputs)
    _check_grad_output(grad_output, shape)
    gradients = _kernel("ms_deform_attn_backward", backend)(
        grad_output.to(inputs[0].dtype).contiguous(),
        tuple(needed),
        *arguments,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return tuple(
        like.new_empty(0) if gradient is None else gradient.to(like.dtype).view(like.shape)
        for gradient, like in zip(gradients, _differentiable(*inputs))
    )


def by_reference(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points, method
):
    """The same function as plain torch code, for backend="reference": differentiable any number of times."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    _check(*inputs, points, method)
    if direct.nothing_traces():  # else there may be no elements to read
        _check_levels(value, spatial_shapes, level_start_index)
    points = _points_per_level(spatial_shapes, attention_weights, points)
    locations, weights = _coordinates(value, sampling_locations, attention_weights)
    return reference.ms_deform_attn(
        value, spatial_shapes, level_start_index, locations, weights, points, method
    )


def _differentiable(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *options
):
    return value, sampling_locations, attention_weights


def _check_grad_output(grad_output, shape) -> None:
    if grad_output.shape != shape:
        _fail("grad_output", str(list(shape)), list(grad_output.shape))


def _forward_fake(*inputs):
    return inputs[0].new_empty(_check(*inputs[:7]))


def _backward_fake(grad_output, needed, *inputs):
    _check_grad_output(grad_output, _check(*inputs[:7]))
    return tuple(
        like.new_empty(like.shape if need else 0) for like, need in zip(_differentiable(*inputs), needed)
    )


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.points_per_level, ctx.method, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_output):
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
    saved = ctx.saved_tensors  # under activation checkpointing, to be asked for once
    arguments = (grad_output, needed, *saved, ctx.points_per_level, ctx.method, ctx.backend)
    # With grad mode on somebody wants a second derivative: only the op knows how to refuse one.
    unseen = not torch.is_grad_enabled() and direct.nothing_watches(grad_output, *saved)
    gradients = _backward(*arguments) if unseen else torch.ops.vitkern.ms_deform_attn_backward(*arguments)
    grad_value, grad_locations, grad_weights = (g if need else None for g, need in zip(gradients, needed))
    return grad_value, None, None, grad_locations, grad_weights, None, None, None


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "vitkern.ms_deform_attn has no second derivative in its kernels; backend='reference' has those of any order"
    )


for _name, _real, _fake, _formula, _save in (
    ("ms_deform_attn", _forward, _forward_fake, _differentiate, _save_for_backward),
    ("ms_deform_attn_backward", _backward, _backward_fake, _no_second_derivative, None),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitkern::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"vitkern::{_name}", _formula, setup_context=_save, lib=_library)


class _Direct(torch.autograd.Function):
    """The op's implementation and gradient formula, without the dispatcher between them (vitkern.ops.direct)."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def ms_deform_attn(*inputs):
    """torch.ops.vitkern.ms_deform_attn with all eight arguments, by the shortest way that nobody can tell from it."""
    tensors = inputs[:5]
    if not direct.nothing_watches(*tensors):
        return torch.ops.vitkern.ms_deform_attn(*inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Direct.apply(*inputs)
    return _forward(*inputs)
