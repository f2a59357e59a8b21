# SPDX-License-Identifier: Apache-2.0
"""Allocates for the Triton kernels of ms_deform_attn and launches them, on what is contiguous and checked.

Triton is imported at the first launch, so that the package imports without it. No device tensor is read on the host:
every launch can be captured in a CUDA graph after a first call has compiled it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops.ms_deform_attn import MsDeformAttnCall
from vitkern.ops.native import accumulator
from vitkern.ops.native_ms_deform_attn import new_gradients, sort_by_cell
from vitkern.ops.triton_common import cdiv, on

# Queries, or pixels, of one program while interpreting: there the price is per operation, whatever the block size.
_INTERPRETED_BLOCK = 64
# Elements of an image up to which an offset fits 32 bits, one row of pixels beyond either end included.
_INT32_OFFSETS = 2**30


@functools.cache
def _groups(points_per_level: tuple[int, ...], device: torch.device) -> tuple[int, int, Tensor | None]:
    """Runs of points that share a level: how many, points of one, and, unless run and level agree, a table.

    The table holds the level of each run and then the number of points of each level.
    """
    points = math.gcd(*points_per_level)
    levels = [level for level, count in enumerate(points_per_level) for _ in range(count // points)]
    if levels == list(range(len(points_per_level))):
        return len(levels), points, None
    table = [*levels, *points_per_level]
    return len(levels), points, torch.tensor(table, dtype=torch.int32, device=device)


def _inputs(call: MsDeformAttnCall) -> tuple:
    """What every kernel reads: levels, locations and weights, and the reference points with their strides."""
    reference, strides = call.reference_points, (0, 0, 0)
    if reference is not None:
        images, levels = call.value.shape[0], call.spatial_shapes.shape[0]
        image, query, level, _ = reference.expand(images, -1, levels, -1).stride()
        strides = (image, query, level)
    level_of_group = _groups(call.points_per_level, call.value.device)[2]
    tables = (call.spatial_shapes, call.level_start_index, level_of_group)
    return *tables, call.locations, call.weights, reference, *strides


def _constants(call: MsDeformAttnCall) -> dict[str, Any]:
    """What every kernel is specialised on."""
    import triton.language as tl

    groups, group_points, _ = _groups(call.points_per_level, call.value.device)
    return {
        "GROUPS": groups,
        "GROUP_POINTS": group_points,
        "NUMBERS": 0 if call.reference_points is None else call.reference_points.shape[3],
        "BILINEAR": call.method == "bilinear",
        "ACC": tl.float64 if call.value.dtype == torch.float64 else tl.float32,
    }


def _offset(value: Tensor):
    """The type of an offset within one image."""
    import triton.language as tl

    return tl.int32 if value[0].numel() < _INT32_OFFSETS else tl.int64


def _blocks(call: MsDeformAttnCall, backward: bool = False) -> dict[str, int]:
    from vitkern.triton_kernels import ms_deform_attn as kernels

    value = call.value
    blocks = kernels.launch_table(value.shape[3], value.element_size(), backward)
    if torch.version.hip:
        blocks.pop("maxnreg", None)  # NVIDIA's compiler alone knows it
    return blocks if value.is_cuda else blocks | {"BLOCK_Q": _INTERPRETED_BLOCK}


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ms_deform_attn_forward_triton(
    call: MsDeformAttnCall, complain: Callable[..., None]
) -> Callable[..., Tensor]:
    """A function of tensors like those of the call, after `complain` has looked at the levels."""
    points_per_level, method = call.points_per_level, call.method

    def forward(value, shapes, starts, *others):
        complain(value, shapes, starts)
        *reference_points, locations, weights = others
        return _forward(
            MsDeformAttnCall(
                value, shapes, starts, locations, weights, points_per_level, method, *reference_points
            )
        )

    return forward


def _forward(call: MsDeformAttnCall) -> Tensor:
    batch, pixels, heads, channels, queries, *_ = call.sizes
    output = call.value.new_empty(batch, queries, heads * channels)
    if output.numel() == 0:
        return output
    if call.value.numel() == 0 or call.weights.numel() == 0:
        return output.zero_()

    from vitkern.triton_kernels import ms_deform_attn as kernels

    blocks = _blocks(call)
    grid = (batch * heads * cdiv(queries, blocks["BLOCK_Q"]), cdiv(channels, blocks["BLOCK_D"]))
    with on(call.value):
        kernels.ms_deform_attn_forward[grid](
            output,
            call.value,
            *_inputs(call),
            pixels,
            heads,
            queries,
            channels,
            **_constants(call),
            **blocks,
            OFFSET=_offset(call.value),
        )
    return output


def ms_deform_attn_backward_triton(
    call: MsDeformAttnCall, grad_output: Tensor, needed: Sequence[bool], deterministic: bool = False
) -> list[Tensor | None]:
    """Gradients of value, locations and weights, and, in the fused form, of the places sampled."""
    if call.value.numel() == 0 or call.weights.numel() == 0:
        gradients = new_gradients(call, needed)
        return [None if gradient is None else gradient.zero_() for gradient in gradients[: len(needed)]]

    # Atomics need zeros to add to; the deterministic pass writes every element.
    gradients = new_gradients(call, (False, *needed[1:]))
    if needed[0] and not deterministic:
        gradients[0] = torch.zeros_like(call.value, dtype=accumulator(call.value.dtype))
    if any(gradient is not None for gradient in gradients):
        _backward(call, grad_output, gradients)
    if needed[0] and deterministic:
        gradients[0] = _gather_grad_value(call, grad_output)
    if gradients[0] is not None:
        gradients[0] = gradients[0].to(call.value.dtype)
    return gradients[: len(needed)]


def _backward(call: MsDeformAttnCall, grad_output: Tensor, gradients: list[Tensor | None]) -> None:
    """Adds to the gradient of value, writes the others; those that are None are not wanted."""
    from vitkern.triton_kernels import ms_deform_attn_backward as kernels

    batch, pixels, heads, channels, queries, _, points = call.sizes
    blocks, constants = _blocks(call, backward=True), _constants(call)
    with on(call.value):
        kernels.ms_deform_attn_backward[(batch * heads * cdiv(queries, blocks["BLOCK_Q"]),)](
            *gradients,
            grad_output,
            call.value,
            *_inputs(call),
            pixels,
            heads,
            queries,
            channels,
            **constants,
            **blocks,
            OFFSET=_offset(call.value),
            BLOCK_P=_next_power_of_2(constants["GROUP_POINTS"]),
            BLOCK_K=_next_power_of_2(points),
        )


def _gather_grad_value(call: MsDeformAttnCall, grad_output: Tensor) -> Tensor:
    """The bitwise reproducible gradient of value: points sorted by pixel, then summed pixel by pixel."""
    from vitkern.triton_kernels import ms_deform_attn_deterministic as kernels

    batch, pixels, heads, channels, queries, *_ = call.sizes
    blocks, constants, inputs = _blocks(call), _constants(call), _inputs(call)
    num_warps, block_s, block_d = blocks["num_warps"], blocks["BLOCK_Q"], blocks["BLOCK_D"]
    block_q = 32 * num_warps
    cells = torch.empty(call.weights.numel(), dtype=torch.int64, device=call.value.device)
    grad_value = torch.empty_like(call.value, dtype=accumulator(call.value.dtype))
    softmax = None
    if call.reference_points is not None:
        softmax = grad_value.new_empty(batch, queries, heads, 2)
    with on(call.value):
        kernels.ms_deform_attn_cells[(batch * heads * cdiv(queries, block_q),)](
            cells,
            softmax,
            *inputs,
            batch,
            pixels,
            heads,
            queries,
            **constants,
            BLOCK_Q=block_q,
            num_warps=num_warps,
        )
        order, first = sort_by_cell(cells, batch * heads * pixels)
        grid = (batch * heads * cdiv(pixels, block_s), cdiv(channels, block_d))
        kernels.ms_deform_attn_gather_grad_value[grid](
            grad_value,
            grad_output,
            softmax,
            order,
            first,
            *inputs,
            pixels,
            heads,
            queries,
            channels,
            L=call.spatial_shapes.shape[0],
            **constants,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return grad_value
