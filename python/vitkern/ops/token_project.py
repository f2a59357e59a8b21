# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.token_project: the checks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.op import Op
from vitkern.ops.plain import accumulated
from vitkern.ops.plan import Plan, Spec

_CONTRACT = Contract("token_project", "x")
MOST_TOKENS = 512  # of the Triton kernels


class Inputs(NamedTuple):
    x: Tensor  # [B, N, C]
    query: Tensor  # [B, N, K]
    key: Tensor  # [B, T, K]
    tokens: Tensor  # [B, T, C]
    backend: str | None = None


def _check(inputs: Inputs) -> list[Spec]:
    contract, (x, query, key, tokens, _) = _CONTRACT, inputs
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


def _limits(backend: str, inputs: Inputs) -> str | None:
    tokens = inputs.tokens.shape[1]
    if backend == "triton" and tokens > MOST_TOKENS:
        return f"tokens must be at most {MOST_TOKENS}, got {tokens}"
    return None


def _plan(backend: str, inputs: Inputs, outputs: Sequence[Spec]) -> Plan:
    if backend == "triton":
        from vitkern.ops import triton_token_project as triton

        return triton.plan(inputs)
    x, query, key, tokens, _ = inputs
    host, total = native.host(backend, x.device), native.accumulator(x.dtype)
    gradients = native.specs(x.dtype, (query.shape, x.dtype), (key.shape, total), (tokens.shape, total))
    return Plan(
        host.token_project_forward(native.specs(x.dtype, *outputs)), host.token_project_backward(gradients)
    )


def _reference(inputs: Inputs) -> Tensor:
    return accumulated(reference.token_project, *inputs[:-1])


token_project = Op(
    "token_project",
    Inputs,
    differentiable=("query", "key", "tokens"),
    passed_on="x",
    check=_check,
    plan=_plan,
    limits=_limits,
    reference=_reference,
    flops=lambda x, query, key, tokens, *_: 2 * math.prod(query[:2]) * tokens[1] * (query[2] + tokens[2]),
)
