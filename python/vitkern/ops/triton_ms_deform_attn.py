# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ms_deform_attn and ms_deform_attn_fused: allocation and launches, on contiguous tensors.

Triton is imported at the first launch, so that the package imports without it. No device tensor is read on the host:
every launch can be captured in a CUDA graph after a first call has compiled it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitkern.ops.ms_deform_attn import sort_by_cell
from vitkern.ops.ms_deform_attn_checks import Attention, Fused, points_of
from vitkern.ops.native import accumulator
from vitkern.ops.plan import Gradients, Needed, Plan, plan_of
from vitkern.ops.triton_common import cdiv, on

# Queries, or pixels, of one program while interpreting: there the cost is per operation, for any block size.
_INTERPRETED_BLOCK = 64
# Elements of an image up to which an offset fits 32 bits, one row of pixels beyond either end included.
_INT32_OFFSETS = 2**30


def plan(inputs: Attention) -> Plan:
    return plan_of(inputs, 6 if isinstance(inputs, Fused) else 5, _forward, _backward)


def _sizes(call: Attention) -> tuple[int, int, int, int, int]:
    """The sizes B, S, M, D and Q."""
    batch, pixels, heads, channels = call.value.shape
    return batch, pixels, heads, channels, call.weights.shape[1]


@functools.cache
def _groups(points_per_level: tuple[int, ...], device: torch.device) -> tuple[int, int, Tensor | None]:
    """Runs of points that share a level: their number, the points of one, and a table if runs and levels differ.

    The table holds the level of each run and then the number of points of each level.
    """
    points = math.gcd(*points_per_level)
    levels = [level for level, count in enumerate(points_per_level) for _ in range(count // points)]
    if levels == list(range(len(points_per_level))):
        return len(levels), points, None
    table = [*levels, *points_per_level]
    return len(levels), points, torch.tensor(table, dtype=torch.int32, device=device)


def _inputs(call: Attention) -> tuple[object, ...]:
    """The inputs of every kernel: levels, locations and weights, and the reference points with their strides."""
    reference, strides = None, (0, 0, 0)
    if isinstance(call, Fused):
        reference, levels = call.reference_points, call.spatial_shapes.shape[0]
        image, query, level, _ = reference.expand(call.value.shape[0], -1, levels, -1).stride()
        strides = (image, query, level)
    level_of_group = _groups(points_of(call), call.value.device)[2]
    tables = (call.spatial_shapes, call.level_start_index, level_of_group)
    return *tables, call.locations, call.weights, reference, *strides


def _constants(call: Attention) -> dict[str, object]:
    """The constants that every kernel is specialised on."""
    import triton.language as tl

    groups, group_points, _ = _groups(points_of(call), call.value.device)
    return {
        "GROUPS": groups,
        "GROUP_POINTS": group_points,
        "NUMBERS": call.reference_points.shape[3] if isinstance(call, Fused) else 0,
        "BILINEAR": call.method == "bilinear",
        "ACC": tl.float64 if call.value.dtype == torch.float64 else tl.float32,
    }


def _offset(value: Tensor) -> object:
    """The type of an offset within one image."""
    import triton.language as tl

    return tl.int32 if value[0].numel() < _INT32_OFFSETS else tl.int64


def _blocks(call: Attention, backward: bool = False) -> dict[str, int]:
    from vitkern.triton_kernels import ms_deform_attn as kernels

    value = call.value
    blocks = kernels.launch_table(value.shape[3], value.element_size(), backward)
    if torch.version.hip:
        blocks.pop("maxnreg", None)  # an option that only NVIDIA's compiler has
    return blocks if value.is_cuda else blocks | {"BLOCK_Q": _INTERPRETED_BLOCK}


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _forward(call: Attention) -> Tensor:
    batch, pixels, heads, channels, queries = _sizes(call)
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


def _new_gradients(call: Attention, needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of value, of the sampled locations in the fused form, of locations and of weights."""
    likes, total = [call.value, call.locations, call.weights], accumulator(call.value.dtype)
    wanted = [like if need else None for like, need in zip(likes, (needed[0], *needed[-2:]))]
    gradients = [None if like is None else torch.empty_like(like) for like in wanted]
    if isinstance(call, Fused):
        gradients.insert(1, torch.empty_like(call.locations, dtype=total) if needed[1] else None)
    return gradients


def _backward(needed: Needed, grad_output: Tensor, call: Attention) -> Gradients:
    """The gradients of value, of the sampled locations in the fused form, of locations and of weights."""
    if call.value.numel() == 0 or call.weights.numel() == 0:
        return [None if each is None else each.zero_() for each in _new_gradients(call, needed)]

    # Atomics need zeros to add to; the deterministic pass writes every element.
    gradients = _new_gradients(call, (False, *needed[1:]))
    deterministic = torch.are_deterministic_algorithms_enabled()
    if needed[0] and not deterministic:
        gradients[0] = torch.zeros_like(call.value, dtype=accumulator(call.value.dtype))
    if any(gradient is not None for gradient in gradients):
        _scatter(call, grad_output, gradients)
    if needed[0] and deterministic:
        gradients[0] = _gather_grad_value(call, grad_output)
    return gradients


def _scatter(call: Attention, grad_output: Tensor, gradients: list[Tensor | None]) -> None:
    """Adds to the gradient of value, writes the others; those that are None are not needed."""
    from vitkern.triton_kernels import ms_deform_attn_backward as kernels

    batch, pixels, heads, channels, queries = _sizes(call)
    blocks, (_, group_points, _) = _blocks(call, backward=True), _groups(points_of(call), call.value.device)
    grad_value, *grad_computed, grad_locations, grad_weights = gradients
    with on(call.value):
        kernels.ms_deform_attn_backward[(batch * heads * cdiv(queries, blocks["BLOCK_Q"]),)](
            grad_value,
            grad_locations,
            grad_weights,
            grad_computed[0] if grad_computed else None,
            grad_output,
            call.value,
            *_inputs(call),
            pixels,
            heads,
            queries,
            channels,
            **_constants(call),
            **blocks,
            OFFSET=_offset(call.value),
            BLOCK_P=_next_power_of_2(group_points),
            BLOCK_K=_next_power_of_2(sum(points_of(call))),
        )


def _gather_grad_value(call: Attention, grad_output: Tensor) -> Tensor:
    """The bitwise reproducible gradient of value: points sorted by pixel, then summed pixel by pixel."""
    from vitkern.triton_kernels import ms_deform_attn_deterministic as kernels

    batch, pixels, heads, channels, queries = _sizes(call)
    blocks, constants, inputs = _blocks(call), _constants(call), _inputs(call)
    num_warps, block_s, block_d = blocks["num_warps"], blocks["BLOCK_Q"], blocks["BLOCK_D"]
    block_q = 32 * num_warps
    cells = torch.empty(call.weights.numel(), dtype=torch.int64, device=call.value.device)
    grad_value = torch.empty_like(call.value, dtype=accumulator(call.value.dtype))
    softmax = None
    if isinstance(call, Fused):
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
