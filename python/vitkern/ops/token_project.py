# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.token_project: what it asks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``.
"""

from __future__ import annotations

from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.derivative import Spec
from vitkern.ops.op import BACKEND, Op, Plan
from vitkern.ops.plain import accumulated

_CONTRACT = Contract("token_project", "x")
MOST_TOKENS = 512  # of the Triton kernels


def _check(x: Tensor, query: Tensor, key: Tensor, tokens: Tensor, backend: str | None) -> list[Spec]:
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
    return [(x.shape, x.dtype)]


def _limits(backend: str, x: Tensor, query: Tensor, key: Tensor, tokens: Tensor) -> str | None:
    if backend == "triton" and tokens.shape[1] > MOST_TOKENS:
        return f"tokens must be at most {MOST_TOKENS}, got {tokens.shape[1]}"
    return None


def _plan(backend: str, x: Tensor, query: Tensor, key: Tensor, tokens: Tensor, requested: str | None) -> Plan:
    if backend == "triton":
        from vitkern.ops import triton_token_project as triton

        return Plan(triton.forward, triton.backward)
    host, total = native.host(backend, x.device), native.accumulator(x.dtype)
    output = native.specs(x.dtype, (x.shape, x.dtype))
    gradients = native.specs(x.dtype, (query.shape, x.dtype), (key.shape, total), (tokens.shape, total))
    return Plan(host.token_project_forward(output), host.token_project_backward(gradients))


def _reference(*tensors: Tensor) -> Tensor:
    return accumulated(reference.token_project, *tensors)


token_project = Op(
    "token_project",
    f"Tensor x, Tensor query, Tensor key, Tensor tokens, {BACKEND}",
    defaults=(None,),
    differentiable=(1, 2, 3),
    passed_on=(0,),
    check=_check,
    plan=_plan,
    limits=_limits,
    reference=_reference,
)
