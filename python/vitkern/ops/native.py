# SPDX-License-Identifier: Apache-2.0
"""From tensors to the raw pointers that the compiled kernels take. Callers have checked and made everything contiguous.

The functions of one op come in pairs for ``cpu`` and ``cuda``, which differ in the entry point, in what says where to
run (threads, or device and stream), and in who finishes grad_value.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vitkern import _C

# Mirrors csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SAMPLING_CODES = {"bilinear": 0, "nearest": 1}

# The module whose *_cuda functions are called: the emulated twin of _C in tests (csrc/emulator).
cuda_module: ModuleType = _C


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the kernels add up in: double for double, float for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cuda_target(tensor: Tensor) -> tuple[int, int]:
    """Device ordinal and current stream; zeros on the CPU, where only the emulator comes by."""
    if tensor.is_cuda:
        return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream
    return 0, 0


def _point_end(points_per_level: tuple[int, ...]) -> list[int]:
    """Where each level's points end; empty when all levels have the same number."""
    if len(set(points_per_level)) <= 1:
        return []
    ends, end = [], 0
    for points in points_per_level:
        end += points
        ends.append(end)
    return ends


def _describe(value, spatial_shapes, level_start_index, locations, weights, points_per_level, method):
    """The arguments that forward and backward share: addresses, sizes, ends of ragged levels, codes."""
    inputs = (
        value.data_ptr(),
        spatial_shapes.data_ptr(),
        level_start_index.data_ptr(),
        locations.data_ptr(),
        weights.data_ptr(),
    )
    sizes = (*value.shape, locations.shape[1], spatial_shapes.shape[0], locations.shape[3])
    codes = (SAMPLING_CODES[method], DTYPE_CODES[value.dtype], DTYPE_CODES[locations.dtype])
    return inputs, sizes, _point_end(points_per_level), codes


def ms_deform_attn_forward_cpu(*args) -> Tensor:
    value, locations = args[0], args[3]
    inputs, sizes, point_end, codes = _describe(*args)
    output = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    _C.ms_deform_attn_forward_cpu(inputs, output.data_ptr(), sizes, point_end, codes, torch.get_num_threads())
    return output


def ms_deform_attn_backward_cpu(
    grad_output: Tensor, needed: tuple[bool, bool, bool], *args, deterministic: bool = False
) -> list[Tensor | None]:
    """Bitwise reproducible, asked for or not."""
    value, locations, weights = args[0], args[3], args[4]
    inputs, sizes, point_end, codes = _describe(*args)
    gradients = [
        torch.empty_like(t) if need else None for t, need in zip((value, locations, weights), needed)
    ]
    addresses = tuple(0 if g is None else g.data_ptr() for g in gradients)
    _C.ms_deform_attn_backward_cpu(
        inputs, grad_output.data_ptr(), addresses, sizes, point_end, codes, torch.get_num_threads()
    )
    return gradients


def ms_deform_attn_forward_cuda(*args) -> Tensor:
    value, locations = args[0], args[3]
    inputs, sizes, point_end, codes = _describe(*args)
    output = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    cuda_module.ms_deform_attn_forward_cuda(
        inputs, output.data_ptr(), sizes, point_end, codes, *_cuda_target(value)
    )
    return output


def ms_deform_attn_backward_cuda(
    grad_output: Tensor, needed: tuple[bool, bool, bool], *args, deterministic: bool = False
) -> list[Tensor | None]:
    value, locations, weights = args[0], args[3], args[4]
    inputs, sizes, point_end, codes = _describe(*args)
    target = _cuda_target(value)
    # Atomics need zeros to add to; the deterministic pass writes every element.
    scatter, gather = needed[0] and not deterministic, needed[0] and deterministic
    grad_value = None
    if needed[0]:
        grad_value = (torch.empty_like if gather else torch.zeros_like)(value, dtype=accumulator(value.dtype))
    gradients = [
        grad_value,
        *(torch.empty_like(t) if n else None for t, n in zip((locations, weights), needed[1:])),
    ]

    addresses = [0 if g is None else g.data_ptr() for g in gradients]
    if gather:
        addresses[0] = 0
    if scatter or any(needed[1:]):
        cuda_module.ms_deform_attn_backward_cuda(
            inputs, grad_output.data_ptr(), addresses, sizes, point_end, codes, *target
        )
    if gather:
        assert grad_value is not None
        order, first = _sorted_by_cell(value, weights, inputs, sizes, point_end, codes, target)
        cuda_module.ms_deform_attn_gather_grad_value_cuda(
            inputs,
            grad_output.data_ptr(),
            grad_value.data_ptr(),
            order.data_ptr(),
            first.data_ptr(),
            sizes,
            point_end,
            codes,
            *target,
        )
    if grad_value is not None:
        gradients[0] = grad_value.to(value.dtype)
    return gradients


def _sorted_by_cell(value, weights, inputs, sizes, point_end, codes, target) -> tuple[Tensor, Tensor]:
    """Sampling points in the order of the last pixel they touch, and where the points of each pixel begin."""
    cells = torch.empty(weights.numel(), dtype=torch.int64, device=value.device)
    cuda_module.ms_deform_attn_cells_cuda(inputs, cells.data_ptr(), sizes, point_end, codes, *target)
    return sort_by_cell(cells, value.shape[0] * value.shape[2] * value.shape[1])  # B * M * S


def sort_by_cell(cells: Tensor, cell_bound: int) -> tuple[Tensor, Tensor]:
    """Sampling points in the order of the cells they fall in, and where each cell's points begin."""
    sorted_cells, order = torch.sort(cells, stable=True)
    first = torch.searchsorted(sorted_cells, torch.arange(cell_bound + 1, device=cells.device))
    return order, first
