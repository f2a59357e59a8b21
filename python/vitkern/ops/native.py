# SPDX-License-Identifier: Apache-2.0
"""From tensors to the raw pointers that the compiled kernels take. Callers have checked and made everything contiguous.

The functions of one op come in pairs for ``cpu`` and ``cuda``, which differ in the entry point, in what says where to
run (threads, or device and stream), and in who finishes grad_value.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkern import _C

# Mirrors csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SAMPLING_CODES = {"bilinear": 0, "nearest": 1}

# The module whose *_cuda functions are called: the emulated twin of _C in tests (csrc/emulator).
cuda_module: ModuleType = _C


class MsDeformAttnLayout(NamedTuple):
    """What a kernel is told besides addresses: follows from shapes, strides, dtypes and options."""

    sizes: tuple[int, ...]  # B, S, M, D, Q, L, K
    anchors: tuple[int, ...]  # of the reference points: numbers, strides, 0 along an axis that is broadcast
    point_end: list[int]  # where each level's points end; empty where all levels have the same number
    codes: tuple[int, ...]  # of method and dtypes


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
    known: MsDeformAttnLayout | None = None

    @property
    def layout(self) -> MsDeformAttnLayout:
        return self.known or describe(self)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the kernels add up in: double for double, float for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cuda_target(tensor: Tensor) -> tuple[int, int]:
    """Device ordinal and current stream; zeros on the CPU, where only the emulator comes by."""
    if tensor.is_cuda:
        return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream
    return 0, 0


def workspace(size: int, device: torch.device) -> Tensor:
    """So many bytes for a kernel's intermediate results."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def _point_end(points_per_level: tuple[int, ...]) -> list[int]:
    """Where each level's points end; empty when all levels have the same number."""
    if len(set(points_per_level)) <= 1:
        return []
    ends, end = [], 0
    for points in points_per_level:
        end += points
        ends.append(end)
    return ends


def describe(call: MsDeformAttnCall) -> MsDeformAttnLayout:
    queries, levels, points = call.weights.shape[1], len(call.points_per_level), sum(call.points_per_level)
    sizes = (*call.value.shape, queries, levels, points)
    anchors = (0, 0, 0, 0)
    if call.reference_points is not None:
        images, _, levels, numbers = call.reference_points.shape
        image, query, level, _ = call.reference_points.stride()
        anchors = (numbers, image * (images > 1), query, level * (levels > 1))
    codes = (SAMPLING_CODES[call.method], DTYPE_CODES[call.value.dtype], DTYPE_CODES[call.weights.dtype])
    return MsDeformAttnLayout(sizes, anchors, _point_end(call.points_per_level), codes)


def _told(call: MsDeformAttnCall):
    """The arguments that every pass takes: addresses, reference points, sizes, ends of ragged levels, codes."""
    value, shapes, starts, locations, weights, _, _, reference_points, _ = call
    sizes, anchors, point_end, codes = call.layout
    inputs = (
        value.data_ptr(),
        shapes.data_ptr(),
        starts.data_ptr(),
        locations.data_ptr(),
        weights.data_ptr(),
    )
    address = 0 if reference_points is None else reference_points.data_ptr()
    return inputs, (address, *anchors), sizes, point_end, codes


def levels_tile(shapes: Tensor, starts: Tensor, pixels: int) -> bool:
    """Whether the levels, in tables on the host, cover the pixels without gap or overlap."""
    if not (shapes.is_contiguous() and starts.is_contiguous()):
        shapes, starts = shapes.contiguous(), starts.contiguous()
    return _C.levels_tile(shapes.data_ptr(), starts.data_ptr(), starts.numel(), pixels)


def _new_output(call: MsDeformAttnCall) -> Tensor:
    batch, _, heads, channels, queries, _, _ = call.layout.sizes
    return call.value.new_empty(batch, queries, heads * channels)


def _new_gradients(call: MsDeformAttnCall, needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of value, locations and weights, and, in the fused form, of the places sampled."""
    wanted = [torch.empty_like(t) if need else None for t, need in zip((call[0], call[3], call[4]), needed)]
    places = (
        torch.empty_like(call.locations, dtype=accumulator(call.value.dtype))
        if needed[3:] == (True,)
        else None
    )
    return [*wanted, places]


def addresses(tensors: Sequence[Tensor | None]) -> Any:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def ms_deform_attn_forward_cpu(*arguments) -> Tensor:
    call = MsDeformAttnCall(*arguments)
    output = _new_output(call)
    inputs, anchors, sizes, point_end, codes = _told(call)
    threads = torch.get_num_threads()
    _C.ms_deform_attn_forward_cpu(inputs, anchors, output.data_ptr(), sizes, point_end, codes, threads)
    return output


def ms_deform_attn_backward_cpu(
    grad_output: Tensor, needed: tuple[bool, ...], *arguments, deterministic: bool = False
) -> list[Tensor | None]:
    """Bitwise reproducible, asked for or not."""
    call = MsDeformAttnCall(*arguments)
    gradients = _new_gradients(call, needed)
    inputs, anchors, sizes, point_end, codes = _told(call)
    to, threads = addresses(gradients), torch.get_num_threads()
    _C.ms_deform_attn_backward_cpu(
        inputs, anchors, grad_output.data_ptr(), to, sizes, point_end, codes, threads
    )
    return gradients[: len(needed)]


def ms_deform_attn_forward_cuda(*arguments) -> Tensor:
    call = MsDeformAttnCall(*arguments)
    output = _new_output(call)
    inputs, anchors, *rest = _told(call)
    target = cuda_target(call.value)
    cuda_module.ms_deform_attn_forward_cuda(inputs, anchors, output.data_ptr(), *rest, *target)
    return output


def ms_deform_attn_backward_cuda(
    grad_output: Tensor, needed: tuple[bool, ...], *arguments, deterministic: bool = False
) -> list[Tensor | None]:
    call = MsDeformAttnCall(*arguments)
    inputs, anchors, *rest = _told(call)
    target = cuda_target(call.value)
    gradients = _new_gradients(call, (False, *needed[1:]))
    total = accumulator(call.value.dtype)
    if needed[0] and not deterministic:
        gradients[0] = torch.zeros_like(call.value, dtype=total)  # what atomics add to
    if gradients[2] is not None and call.reference_points is not None:
        gradients[2] = torch.empty_like(call.weights, dtype=total)  # where (6) of all points waits for (11)
    if any(gradient is not None for gradient in gradients):
        cuda_module.ms_deform_attn_backward_cuda(
            inputs, anchors, grad_output.data_ptr(), addresses(gradients), *rest, *target
        )
    if needed[0] and deterministic:
        gradients[0] = torch.empty_like(call.value, dtype=total)
        order, first, softmax = _sorted_by_cell(call, target)
        given = addresses((grad_output, gradients[0], order, first, softmax))
        cuda_module.ms_deform_attn_gather_grad_value_cuda(inputs, anchors, *given, *rest, *target)
    # Those that were summed up in the accumulator's type are rounded once.
    grad_value, grad_locations, grad_weights, grad_places = gradients
    grad_value = None if grad_value is None else grad_value.to(call.value.dtype)
    grad_weights = None if grad_weights is None else grad_weights.to(call.weights.dtype)
    return [grad_value, grad_locations, grad_weights, grad_places][: len(needed)]


def _sorted_by_cell(call: MsDeformAttnCall, target: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sampling points in the order of the last pixel they touch, where those of each pixel begin, and the softmax."""
    batch, pixels, heads, _ = call.value.shape
    cells = torch.empty(call.weights.numel(), dtype=torch.int64, device=call.value.device)
    softmax = None
    if call.reference_points is not None:  # greatest logit and 1 / sum of each image, query and head
        size = (*call.weights.shape[:3], 2)
        softmax = torch.empty(size, dtype=accumulator(call.value.dtype), device=call.value.device)
    inputs, anchors, *rest = _told(call)
    cuda_module.ms_deform_attn_cells_cuda(inputs, anchors, *addresses((cells, softmax)), *rest, *target)
    return *sort_by_cell(cells, batch * pixels * heads), softmax


def sort_by_cell(cells: Tensor, cell_bound: int) -> tuple[Tensor, Tensor]:
    """Sampling points in the order of the cells they fall in, and where each cell's points begin."""
    sorted_cells, order = torch.sort(cells, stable=True)
    first = torch.searchsorted(sorted_cells, torch.arange(cell_bound + 1, device=cells.device))
    return order, first
