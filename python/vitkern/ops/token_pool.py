# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.token_pool: what it asks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``. The second output is m and l of eq. (4) over all pixels,
which backward needs, as it needs the tokens.
"""

from __future__ import annotations

from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.derivative import Spec
from vitkern.ops.op import BACKEND, Op, Plan
from vitkern.ops.plain import accumulated

_CONTRACT = Contract("token_pool", "x")
MOST_TOKENS = 256  # of the Triton kernels


def _check(x: Tensor, weight: Tensor, backend: str | None) -> list[Spec]:
    contract = _CONTRACT
    contract.check_kernel_dtype("x", x)
    if x.dim() != 3:
        contract.fail("x", "[B, N, C]", list(x.shape))
    batch, _, channels = x.shape
    contract.check_floating("weight", weight, x)
    images = weight.shape[:-2]  # none, or each with a weight of its own
    tokens = weight.shape[-2] if weight.dim() > 1 else 0
    # Compared length first: an axis of unknown size is not to be held against another axis.
    if len(images) > 1 or weight.shape != (*((batch,) if images else ()), tokens, channels):
        expected = f"[T, C] or [B, T, C] with B={batch}, C={channels}"
        contract.fail("weight", expected, list(weight.shape))
    return [((batch, tokens, channels), x.dtype), ((batch, 2, tokens), native.accumulator(x.dtype))]


def _limits(backend: str, x: Tensor, weight: Tensor) -> str | None:
    if backend == "triton" and weight.shape[-2] > MOST_TOKENS:
        return f"weight must have at most {MOST_TOKENS} tokens, got {weight.shape[-2]}"
    return None


def _plan(backend: str, x: Tensor, weight: Tensor, requested: str | None) -> Plan:
    if backend == "triton":
        from vitkern.ops import triton_token_pool as triton

        return Plan(triton.forward, triton.backward)
    host, total = native.host(backend, x.device), native.accumulator(x.dtype)
    outputs = native.specs(x.dtype, *_check(x, weight, requested))
    gradients = native.specs(x.dtype, (x.shape, x.dtype), (weight.shape, total))
    return Plan(host.token_pool_forward(outputs), host.token_pool_backward(gradients))


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    return accumulated(reference.token_pool, x, weight.to(x.dtype))


token_pool = Op(
    "token_pool",
    f"Tensor x, Tensor weight, {BACKEND}",
    defaults=(None,),
    differentiable=(0, 1),
    check=_check,
    plan=_plan,
    limits=_limits,
    reference=_reference,
    kept=1,
    keeps_result=True,
)
