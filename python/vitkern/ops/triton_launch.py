# SPDX-License-Identifier: Apache-2.0
"""Allocates for the Triton kernels and launches them. Callers have checked and made everything contiguous.

Triton is imported at the first launch, so that the package imports without it. No device tensor is read on the host:
every launch can be captured in a CUDA graph after a first call has compiled it.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from torch import Tensor

from vitkern.ops.native import accumulator, sort_by_cell

# Queries, or pixels, of one program while interpreting: there the price is per operation, whatever the block size.
_INTERPRETED_BLOCK = 64
# Elements of an image up to which an offset fits 32 bits, one row of pixels beyond either end included.
_INT32_OFFSETS = 2**30


@functools.cache
def _groups(points_per_level: tuple[int, ...], device: torch.device) -> tuple[int, int, Tensor | None]:
    """Runs of points that share a level: how many, points of one, and their levels unless run and level agree."""
    points = math.gcd(*points_per_level)
    levels = [level for level, count in enumerate(points_per_level) for _ in range(count // points)]
    if levels == list(range(len(points_per_level))):
        return len(levels), points, None
    return len(levels), points, torch.tensor(levels, dtype=torch.int32, device=device)


def _constants(value: Tensor, points_per_level: tuple[int, ...], method: str):
    """What every kernel is specialised on, and its table of levels."""
    import triton.language as tl

    groups, group_points, level_of_group = _groups(points_per_level, value.device)
    constants = {
        "GROUPS": groups,
        "GROUP_POINTS": group_points,
        "BILINEAR": method == "bilinear",
        "ACC": tl.float64 if value.dtype == torch.float64 else tl.float32,
    }
    return constants, level_of_group


def _offset(value: Tensor):
    """The type of an offset within one image."""
    import triton.language as tl

    return tl.int32 if value[0].numel() < _INT32_OFFSETS else tl.int64


def _blocks(value: Tensor, backward: bool = False) -> dict[str, int]:
    from vitkern.triton_kernels import ms_deform_attn as kernels

    blocks = kernels.launch_table(value.shape[3], value.element_size(), backward)
    return blocks if value.is_cuda else blocks | {"BLOCK_Q": _INTERPRETED_BLOCK}


def _on(tensor: Tensor):
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ms_deform_attn_forward_triton(
    value: Tensor,  # [B, S, M, D]
    spatial_shapes: Tensor,  # [L, 2]
    level_start_index: Tensor,  # [L]
    locations: Tensor,  # [B, Q, M, K, 2]
    weights: Tensor,  # [B, Q, M, K]
    points_per_level: tuple[int, ...],
    method: str,
) -> Tensor:  # [B, Q, M * D]
    batch, pixels, heads, channels = value.shape
    queries = weights.shape[1]
    output = value.new_empty(batch, queries, heads * channels)
    if output.numel() == 0:
        return output
    if pixels == 0 or weights.numel() == 0:
        return output.zero_()

    from vitkern.triton_kernels import ms_deform_attn as kernels

    constants, level_of_group = _constants(value, points_per_level, method)
    blocks = _blocks(value)
    grid = (batch * heads * _cdiv(queries, blocks["BLOCK_Q"]), _cdiv(channels, blocks["BLOCK_D"]))
    with _on(value):
        kernels.ms_deform_attn_forward[grid](
            output,
            value,
            spatial_shapes,
            level_start_index,
            level_of_group,
            locations,
            weights,
            pixels,
            heads,
            queries,
            channels,
            **constants,
            **blocks,
            OFFSET=_offset(value),
        )
    return output


def ms_deform_attn_backward_triton(
    grad_output: Tensor,  # [B, Q, M * D]
    needed: tuple[bool, bool, bool],
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
    points_per_level: tuple[int, ...],
    method: str,
    deterministic: bool = False,
) -> list[Tensor | None]:
    batch, pixels, heads, channels = value.shape
    queries = weights.shape[1]
    if value.numel() == 0 or weights.numel() == 0:
        return [torch.zeros_like(t) if need else None for t, need in zip((value, locations, weights), needed)]

    # Atomics need zeros to add to; the deterministic pass writes every element.
    scatter, gather = needed[0] and not deterministic, needed[0] and deterministic
    grad_value = torch.zeros_like(value, dtype=accumulator(value.dtype)) if scatter else None
    grad_locations = torch.empty_like(locations) if needed[1] else None
    grad_weights = torch.empty_like(weights) if needed[2] else None
    if scatter or any(needed[1:]):
        from vitkern.triton_kernels import ms_deform_attn as kernels

        constants, level_of_group = _constants(value, points_per_level, method)
        blocks = _blocks(value, backward=True)
        with _on(value):
            kernels.ms_deform_attn_backward[(batch * heads * _cdiv(queries, blocks["BLOCK_Q"]),)](
                grad_value,
                grad_locations,
                grad_weights,
                grad_output,
                value,
                spatial_shapes,
                level_start_index,
                level_of_group,
                locations,
                weights,
                pixels,
                heads,
                queries,
                channels,
                **constants,
                **blocks,
                OFFSET=_offset(value),
                BLOCK_P=_next_power_of_2(constants["GROUP_POINTS"]),
            )
    if gather:
        grad_value = _gather_grad_value(
            grad_output,
            value,
            spatial_shapes,
            level_start_index,
            locations,
            weights,
            points_per_level,
            method,
        )
    return [None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights]


def _gather_grad_value(
    grad_output, value, spatial_shapes, level_start_index, locations, weights, points_per_level, method
) -> Tensor:
    """The bitwise reproducible gradient of value: points sorted by pixel, then summed pixel by pixel."""
    from vitkern.triton_kernels import ms_deform_attn_deterministic as kernels

    batch, pixels, heads, channels = value.shape
    queries = weights.shape[1]
    constants, level_of_group = _constants(value, points_per_level, method)
    blocks = _blocks(value)
    num_warps, block_s, block_d = blocks["num_warps"], blocks["BLOCK_Q"], blocks["BLOCK_D"]
    block_q = 32 * num_warps
    cells = torch.empty(weights.numel(), dtype=torch.int64, device=value.device)
    grad_value = torch.empty_like(value, dtype=accumulator(value.dtype))
    with _on(value):
        kernels.ms_deform_attn_cells[(batch * heads * _cdiv(queries, block_q),)](
            cells,
            spatial_shapes,
            level_start_index,
            level_of_group,
            locations,
            batch,
            pixels,
            heads,
            queries,
            **constants,
            BLOCK_Q=block_q,
            num_warps=num_warps,
        )
        order, first = sort_by_cell(cells, batch * heads * pixels)
        kernels.ms_deform_attn_gather_grad_value[
            (batch * heads * _cdiv(pixels, block_s), _cdiv(channels, block_d))
        ](
            grad_value,
            grad_output,
            spatial_shapes,
            level_start_index,
            level_of_group,
            locations,
            weights,
            order,
            first,
            pixels,
            heads,
            channels,
            L=spatial_shapes.shape[0],
            **constants,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return grad_value
