# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.token_pool: the checks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``. The second output is m and l of eq. (4) over all pixels;
backward needs it, and the tokens.
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

_CONTRACT = Contract("token_pool", "x")
MOST_TOKENS = 256  # of the Triton kernels


class Inputs(NamedTuple):
    x: Tensor  # [B, N, C]
    weight: Tensor  # [T, C] or [B, T, C]
    backend: str | None = None


def _check(inputs: Inputs) -> list[Spec]:
    contract, (x, weight, _) = _CONTRACT, inputs
    contract.check_kernel_dtype("x", x)
    if x.dim() != 3:
        contract.fail("x", "[B, N, C]", list(x.shape))
    batch, _, channels = x.shape
    contract.check_floating("weight", weight, x)
    images = weight.shape[:-2]  # none, or one with a weight for each image
    tokens = weight.shape[-2] if weight.dim() > 1 else 0
    # The length is compared first: an axis of unknown size must not be compared with another axis.
    if len(images) > 1 or weight.shape != (*((batch,) if images else ()), tokens, channels):
        expected = f"[T, C] or [B, T, C] with B={batch}, C={channels}"
        contract.fail("weight", expected, list(weight.shape))
    return [((batch, tokens, channels), x.dtype), ((batch, 2, tokens), native.accumulator(x.dtype))]


def _limits(backend: str, inputs: Inputs) -> str | None:
    tokens = inputs.weight.shape[-2]
    if backend == "triton" and tokens > MOST_TOKENS:
        return f"weight must have at most {MOST_TOKENS} tokens, got {tokens}"
    return None


def _plan(backend: str, inputs: Inputs, outputs: Sequence[Spec]) -> Plan:
    if backend == "triton":
        from vitkern.ops import triton_token_pool as triton

        return triton.plan(inputs)
    x, weight, _ = inputs
    host, total = native.host(backend, x.device), native.accumulator(x.dtype)
    gradients = native.specs(x.dtype, (x.shape, x.dtype), (weight.shape, total))
    return Plan(host.token_pool_forward(native.specs(x.dtype, *outputs)), host.token_pool_backward(gradients))


def _reference(inputs: Inputs) -> Tensor:
    return accumulated(reference.token_pool, inputs.x, inputs.weight.to(inputs.x.dtype))


token_pool = Op(
    "token_pool",
    Inputs,
    differentiable=("x", "weight"),
    check=_check,
    plan=_plan,
    limits=_limits,
    reference=_reference,
    kept=1,
    keeps_result=True,
    flops=lambda x, weight, *_: 4 * math.prod(x) * weight[-2],
)
