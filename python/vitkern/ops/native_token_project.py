# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of token_project, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import native
from vitkern.ops.token_project import TokenProjectCall


def _describe(call: TokenProjectCall) -> Any:
    """What every pass is told besides addresses: sizes and dtype."""
    sizes = (*call.x.shape, *call.key.shape[1:])
    return sizes, native.DTYPE_CODES[call.x.dtype]


def _new_gradients(call: TokenProjectCall, needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of query, key and tokens; those summed over pixels in the accumulator's type."""
    dtypes = (call.x.dtype, *[native.accumulator(call.x.dtype)] * 2)
    return [
        torch.empty_like(like, dtype=dtype) if need else None
        for like, dtype, need in zip(call[1:], dtypes, needed)
    ]


def token_project_forward_cpu(call: TokenProjectCall) -> Tensor:
    output = torch.empty_like(call.x)
    inputs, threads = native.addresses(call), torch.get_num_threads()
    native._C.token_project_forward_cpu(inputs, output.data_ptr(), *_describe(call), threads)
    return output


def token_project_backward_cpu(
    call: TokenProjectCall, grad_output: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    gradients = _new_gradients(call, needed)
    inputs, to = native.addresses(call), native.addresses(gradients)
    native._C.token_project_backward_cpu(
        inputs, grad_output.data_ptr(), to, *_describe(call), torch.get_num_threads()
    )
    return gradients


def token_project_forward_cuda(call: TokenProjectCall) -> Tensor:
    output = torch.empty_like(call.x)
    inputs, target = native.addresses(call), native.cuda_target(call.x)
    native.cuda_module.token_project_forward_cuda(inputs, output.data_ptr(), *_describe(call), *target)
    return output


def token_project_backward_cuda(
    call: TokenProjectCall, grad_output: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    gradients, described = _new_gradients(call, needed), _describe(call)
    workspace = native.workspace(native.cuda_module.token_project_workspace_cuda(*described), call.x.device)
    given, to = (native.addresses(call), grad_output.data_ptr()), native.addresses(gradients)
    native.cuda_module.token_project_backward_cuda(
        *given, to, workspace.data_ptr(), *described, *native.cuda_target(call.x)
    )
    return gradients
