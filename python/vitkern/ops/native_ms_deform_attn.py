# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of ms_deform_attn and ms_deform_attn_fused, launched.

The functions come in pairs for ``cpu`` and ``cuda``, which differ in the entry point, in what says where to run
(threads, or device and stream), and in who finishes grad_value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitkern.ops import direct, native
from vitkern.ops.ms_deform_attn import MsDeformAttnCall
from vitkern.ops.ms_deform_attn_checks import SAMPLING_CODES


class Layout(NamedTuple):
    """What a kernel is told besides addresses: follows from shapes, strides, dtypes and options."""

    sizes: tuple[int, ...]  # B, S, M, D, Q, L, K
    anchors: tuple[int, ...]  # address of the reference points, numbers, strides (0 along a shared axis)
    point_end: list[int]  # where each level's points end; empty where all levels have the same number
    codes: tuple[int, ...]  # of method and dtypes


def _layout(call: MsDeformAttnCall) -> Layout:
    anchors = (0, 0, 0, 0, 0)
    if call.reference_points is not None:
        images, _, levels, numbers = call.reference_points.shape
        image, query, level, _ = call.reference_points.stride()
        strides = (image * (images > 1), query, level * (levels > 1))
        anchors = (call.reference_points.data_ptr(), numbers, *strides)
    codes = (
        SAMPLING_CODES[call.method],
        native.DTYPE_CODES[call.value.dtype],
        native.DTYPE_CODES[call.weights.dtype],
    )
    return Layout(call.sizes, anchors, _point_end(call.points_per_level), codes)


def _point_end(points_per_level: tuple[int, ...]) -> list[int]:
    if len(set(points_per_level)) <= 1:
        return []
    ends, end = [], 0
    for points in points_per_level:
        end += points
        ends.append(end)
    return ends


def ms_deform_attn_forward_cpu(
    call: MsDeformAttnCall, complain: Callable[..., None]
) -> Callable[..., Tensor]:
    """A function of tensors like those of the call, which calls `complain` where the levels look wrong."""
    where = -1, torch.get_num_threads
    return native._C.ms_deform_attn_forward_cpu(*_layout(call), direct.lends, *where, complain)


def ms_deform_attn_forward_cuda(
    call: MsDeformAttnCall, complain: Callable[..., None]
) -> Callable[..., Tensor]:
    where = call.value.get_device(), native.current_stream(call.value.device)
    return native.cuda_module.ms_deform_attn_forward_cuda(*_layout(call), direct.lends, *where, complain)


def new_gradients(call: MsDeformAttnCall, needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of value, locations and weights, and, in the fused form, of the places sampled."""
    likes = (call.value, call.locations, call.weights)
    wanted = [torch.empty_like(like) if need else None for like, need in zip(likes, needed)]
    places = None
    if needed[3:] == (True,):
        places = torch.empty_like(call.locations, dtype=native.accumulator(call.value.dtype))
    return [*wanted, places]


def _inputs(call: MsDeformAttnCall) -> tuple[int, ...]:
    return native.addresses((*call[:3], call.locations, call.weights))


def ms_deform_attn_backward_cpu(
    call: MsDeformAttnCall, grad_output: Tensor, needed: Sequence[bool], deterministic: bool = False
) -> list[Tensor | None]:
    """Gradients of value, locations and weights, and, in the fused form, of the places sampled.

    Bitwise reproducible, asked for or not.
    """
    gradients = new_gradients(call, needed)
    given, to = grad_output.data_ptr(), native.addresses(gradients)
    native._C.ms_deform_attn_backward_cpu(_inputs(call), given, to, *_layout(call), torch.get_num_threads())
    return gradients[: len(needed)]


def ms_deform_attn_backward_cuda(
    call: MsDeformAttnCall, grad_output: Tensor, needed: Sequence[bool], deterministic: bool = False
) -> list[Tensor | None]:
    inputs, layout, target = _inputs(call), _layout(call), native.cuda_target(call.value)
    gradients = new_gradients(call, (False, *needed[1:]))
    total = native.accumulator(call.value.dtype)
    if needed[0] and not deterministic:
        gradients[0] = torch.zeros_like(call.value, dtype=total)  # what atomics add to
    if gradients[2] is not None and call.reference_points is not None:
        gradients[2] = torch.empty_like(call.weights, dtype=total)  # where (6) of all points waits for (11)
    if any(gradient is not None for gradient in gradients):
        to = native.addresses(gradients)
        native.cuda_module.ms_deform_attn_backward_cuda(inputs, grad_output.data_ptr(), to, *layout, *target)
    if needed[0] and deterministic:
        gradients[0] = torch.empty_like(call.value, dtype=total)
        order, first, softmax = sorted_by_cell(call)
        given = native.addresses((grad_output, gradients[0], order, first, softmax))
        native.cuda_module.ms_deform_attn_gather_grad_value_cuda(inputs, *given, *layout, *target)
    # Those that were summed up in the accumulator's type are rounded once.
    grad_value, grad_locations, grad_weights, grad_places = gradients
    grad_value = None if grad_value is None else grad_value.to(call.value.dtype)
    grad_weights = None if grad_weights is None else grad_weights.to(call.weights.dtype)
    return [grad_value, grad_locations, grad_weights, grad_places][: len(needed)]


def sorted_by_cell(call: MsDeformAttnCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sampling points in the order of the last pixel they touch, where those of each pixel begin, and the softmax."""
    batch, pixels, heads, *_ = call.sizes
    cells = torch.empty(call.weights.numel(), dtype=torch.int64, device=call.value.device)
    softmax = None
    if call.reference_points is not None:  # greatest logit and 1 / sum of each image, query and head
        size = (*call.weights.shape[:3], 2)
        softmax = torch.empty(size, dtype=native.accumulator(call.value.dtype), device=call.value.device)
    to, target = native.addresses((cells, softmax)), native.cuda_target(call.value)
    native.cuda_module.ms_deform_attn_cells_cuda(_inputs(call), *to, *_layout(call), *target)
    return *sort_by_cell(cells, batch * pixels * heads), softmax


def sort_by_cell(cells: Tensor, cell_bound: int) -> tuple[Tensor, Tensor]:
    """Sampling points in the order of the cells they fall in, and where each cell's points begin."""
    sorted_cells, order = torch.sort(cells, stable=True)
    first = torch.searchsorted(sorted_cells, torch.arange(cell_bound + 1, device=cells.device))
    return order, first
