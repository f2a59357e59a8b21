# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of token_pool, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import native
from vitkern.ops.token_pool import TokenPoolCall


def _describe(call: TokenPoolCall) -> Any:
    """What every pass is told besides addresses: sizes and codes."""
    sizes = (*call.x.shape, call.weight.shape[-2])
    return sizes, (int(call.weight.dim() == 3), native.DTYPE_CODES[call.x.dtype])


def _new_outputs(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, _, channels, tokens = sizes
    statistics = x.new_empty((batch, 2, tokens), dtype=native.accumulator(x.dtype))
    return x.new_empty((batch, tokens, channels)), statistics


def _new_gradients(call: TokenPoolCall, needed: Sequence[bool]) -> list[Tensor | None]:
    total = native.accumulator(call.x.dtype)
    return [
        torch.empty_like(call.x) if needed[0] else None,
        torch.empty_like(call.weight, dtype=total) if needed[1] else None,
    ]


def token_pool_forward_cpu(call: TokenPoolCall) -> tuple[Tensor, Tensor]:
    sizes, codes = _describe(call)
    outputs = _new_outputs(call.x, sizes)
    inputs, to = native.addresses(call), native.addresses(outputs)
    native._C.token_pool_forward_cpu(inputs, *to, sizes, codes, torch.get_num_threads())
    return outputs


def token_pool_backward_cpu(
    call: TokenPoolCall, grad_output: Tensor, tokens: Tensor, statistics: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    gradients = _new_gradients(call, needed)
    given, to = native.addresses((grad_output, tokens, statistics)), native.addresses(gradients)
    native._C.token_pool_backward_cpu(
        native.addresses(call), given, to, *_describe(call), torch.get_num_threads()
    )
    return gradients


def token_pool_forward_cuda(call: TokenPoolCall) -> tuple[Tensor, Tensor]:
    described = _describe(call)
    outputs = _new_outputs(call.x, described[0])
    workspace = native.workspace(
        native.cuda_module.token_pool_workspace_cuda(*described, False), call.x.device
    )
    addresses = native.addresses((*outputs, workspace))
    target = native.cuda_target(call.x)
    native.cuda_module.token_pool_forward_cuda(native.addresses(call), *addresses, *described, *target)
    return outputs


def token_pool_backward_cuda(
    call: TokenPoolCall, grad_output: Tensor, tokens: Tensor, statistics: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    gradients, described = _new_gradients(call, needed), _describe(call)
    workspace = native.workspace(
        native.cuda_module.token_pool_workspace_cuda(*described, True), call.x.device
    )
    given, to = native.addresses((grad_output, tokens, statistics)), native.addresses(gradients)
    native.cuda_module.token_pool_backward_cuda(
        native.addresses(call), given, to, workspace.data_ptr(), *described, *native.cuda_target(call.x)
    )
    return gradients
