# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of adapter_bottleneck, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.adapter_bottleneck import ACTIVATION_CODES, AdapterBottleneckCall


def _describe(call: AdapterBottleneckCall) -> Any:
    """What every pass is told besides addresses: sizes, codes, factor, and what dropout drops."""
    sizes = (*call.x.shape, call.down_weight.shape[0])
    codes = (ACTIVATION_CODES[call.activation], native.DTYPE_CODES[call.x.dtype], int(call.residual_is_x))
    drops = (reference.dropout_threshold(call.dropout_p), reference.dropout_rescale(call.dropout_p))
    return sizes, codes, call.factor, drops


def _new_kept(call: AdapterBottleneckCall) -> Tensor:
    rows, hidden = call.x.shape[0], call.down_weight.shape[0]
    return call.x.new_empty((rows, hidden), dtype=native.accumulator(call.x.dtype))


def _new_gradients(call: AdapterBottleneckCall, needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of x, weights, biases and scale; those of parameters in the accumulator's type."""
    total = native.accumulator(call.x.dtype)
    likes = (*call[:5], call.scale)
    return [
        torch.empty_like(like, dtype=total if position else None) if need else None  # type: ignore[arg-type]
        for position, (like, need) in enumerate(zip(likes, needed))
    ]


def adapter_bottleneck_forward_cpu(call: AdapterBottleneckCall, keep: bool) -> tuple[Tensor, Tensor | None]:
    output, kept = torch.empty_like(call.x), _new_kept(call) if keep else None
    to = native.addresses((output, kept))
    native._C.adapter_bottleneck_forward_cpu(
        native.addresses(call[:8]), *to, *_describe(call), torch.get_num_threads()
    )
    return output, kept


def adapter_bottleneck_backward_cpu(
    call: AdapterBottleneckCall, grad_output: Tensor, kept: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    gradients = _new_gradients(call, needed)
    given, to = native.addresses((grad_output, kept)), native.addresses(gradients)
    native._C.adapter_bottleneck_backward_cpu(
        native.addresses(call[:8]), *given, to, *_describe(call), torch.get_num_threads()
    )
    return gradients


def adapter_bottleneck_forward_cuda(call: AdapterBottleneckCall, keep: bool) -> tuple[Tensor, Tensor | None]:
    output, kept = torch.empty_like(call.x), _new_kept(call) if keep else None
    to, target = native.addresses((output, kept)), native.cuda_target(call.x)
    native.cuda_module.adapter_bottleneck_forward_cuda(
        native.addresses(call[:8]), *to, *_describe(call), *target
    )
    return output, kept


def adapter_bottleneck_backward_cuda(
    call: AdapterBottleneckCall, grad_output: Tensor, kept: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    gradients, described = _new_gradients(call, needed), _describe(call)
    given, to = native.addresses((grad_output, kept)), native.addresses(gradients)
    bytes_needed = native.cuda_module.adapter_bottleneck_workspace_cuda(*described[:2])
    workspace = native.workspace(bytes_needed, call.x.device)
    native.cuda_module.adapter_bottleneck_backward_cuda(
        native.addresses(call[:8]), *given, to, workspace.data_ptr(), *described, *native.cuda_target(call.x)
    )
    return gradients
