# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.token_pool: what it asks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``. The second output is m and l of eq. (4) over all pixels,
which backward needs, as it needs the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.op import BACKEND, Op, kernel
from vitkern.ops.plain import accumulated

_CONTRACT = Contract("token_pool", "x")


class TokenPoolCall(NamedTuple):
    """What the kernels are launched on: contiguous, of one dtype."""

    x: Tensor  # [B, N, C]
    weight: Tensor  # [T, C] or [B, T, C]


def _check(x, weight, backend):
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
    return ((batch, tokens, channels), x.dtype), ((batch, 2, tokens), native.accumulator(x.dtype))


def _plan(backend, *_) -> str:
    return backend


def _call(x, weight) -> TokenPoolCall:
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return TokenPoolCall(x.contiguous(), weight.contiguous())


def _forward(backend):
    launch = kernel("token_pool", "forward", backend)
    return lambda *tensors: launch(_call(*tensors))


def _backward(backend, grad_output, needed, x, weight, tokens, statistics):
    launch = kernel("token_pool", "backward", backend)
    return launch(_call(x, weight), grad_output, tokens, statistics, needed)


def _reference(x, weight):
    return accumulated(reference.token_pool, x, weight.to(x.dtype))


token_pool = Op(
    "token_pool",
    f"Tensor x, Tensor weight, {BACKEND}",
    defaults=(None,),
    differentiable=(0, 1),
    check=_check,
    plan=_plan,
    forward=_forward,
    backward=_backward,
    reference=_reference,
    kept=1,
    keeps_result=True,
)
