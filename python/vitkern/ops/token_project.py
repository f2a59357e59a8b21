# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.token_project: what it asks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitkern import reference
from vitkern.ops.checks import Contract
from vitkern.ops.op import BACKEND, Op, kernel
from vitkern.ops.plain import accumulated

_CONTRACT = Contract("token_project", "x")


class TokenProjectCall(NamedTuple):
    """What the kernels are launched on: contiguous, of one dtype."""

    x: Tensor  # [B, N, C]
    query: Tensor  # [B, N, K]
    key: Tensor  # [B, T, K]
    tokens: Tensor  # [B, T, C]


def _check(x, query, key, tokens, backend):
    contract = _CONTRACT
    contract.check_kernel_dtype("x", x)
    if x.dim() != 3:
        contract.fail("x", "[B, N, C]", list(x.shape))
    for name, tensor in (("query", query), ("key", key), ("tokens", tokens)):
        contract.check_floating(name, tensor, x)
        if tensor.dtype != x.dtype:
            contract.refuse(name, f"of x's dtype {x.dtype}", tensor.dtype)
    batch, pixels, channels = x.shape
    if query.dim() != 3 or query.shape[:2] != (batch, pixels):
        contract.fail("query", f"[B, N, K] with B={batch}, N={pixels}", list(query.shape))
    keys = query.shape[2]
    if key.dim() != 3 or (key.shape[0], key.shape[2]) != (batch, keys):
        contract.fail("key", f"[B, T, K] with B={batch}, K={keys}", list(key.shape))
    count = key.shape[1]
    contract.check_shape(
        "tokens", tokens, (batch, count, channels), f"[B, T, C] = {[batch, count, channels]}"
    )
    return ((x.shape, x.dtype),)


def _plan(backend, *_) -> str:
    return backend


def _call(*tensors) -> TokenProjectCall:
    return TokenProjectCall(*(tensor.contiguous() for tensor in tensors))


def _forward(backend):
    launch = kernel("token_project", "forward", backend)
    return lambda *tensors: launch(_call(*tensors))


def _backward(backend, grad_output, needed, _, *tensors):
    # Nothing depends on the numbers in x, and x was not saved: grad_output has its shape and dtype.
    call = _call(grad_output, *tensors)
    return kernel("token_project", "backward", backend)(call, grad_output, needed)


def _reference(*tensors):
    return accumulated(reference.token_project, *tensors)


token_project = Op(
    "token_project",
    f"Tensor x, Tensor query, Tensor key, Tensor tokens, {BACKEND}",
    defaults=(None,),
    differentiable=(1, 2, 3),
    passed_on=(0,),
    check=_check,
    plan=_plan,
    forward=_forward,
    backward=_backward,
    reference=_reference,
)
