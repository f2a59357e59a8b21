# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.adapter_bottleneck: what it asks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``. Here the scale is ``factor`` times the tensor ``scale``, a
seed means dropout, ``residual_is_x`` spares the second pass over a gradient of x's size, and ``keep`` asks forward to
keep z, eq. (1), for backward, which works it out again where it is not given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.derivative import Spec
from vitkern.ops.op import BACKEND, Op, Plan
from vitkern.ops.plain import accumulated

ACTIVATIONS = ("relu", "gelu", "silu")

_CONTRACT = Contract("adapter_bottleneck", "x")
MOST_HIDDEN = 512  # of the Triton kernels
_SEEDS = 2**63 - 1  # above all that dropout draws


def call(
    x: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    residual: Tensor | None,
    scale: float | Tensor,
    dropout_p: float,
    training: bool,
    activation: str,
    backend: str | None,
) -> Tensor:
    """The op, after a seed was drawn, and with z kept where a backward pass may follow.

    A residual of another dtype than x is added afterwards, as torch adds it.
    """
    if not isinstance(x, Tensor):
        _CONTRACT.refuse("x", "a tensor", type(x).__name__)
    residual_is_x, beside, among = residual is x, None, residual
    if residual_is_x:
        among = None
    elif residual is not None and (not isinstance(residual, Tensor) or residual.dtype != x.dtype):
        _check_residual(residual, x)
        among, beside = None, residual
    learnable, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, _number("scale", scale))
    dropout_p = _number("dropout_p", dropout_p)
    seed = None
    if training and dropout_p > 0:
        seed = torch.randint(_SEEDS, (1,), device=x.device, dtype=torch.int64)
    keep = torch.is_grad_enabled() and _wants_kept(x, *parameters, learnable)
    options = factor, dropout_p, activation, residual_is_x, keep, backend
    output = adapter_bottleneck(x, *parameters, among, learnable, seed, *options)
    return output if beside is None else beside + output


def _wants_kept(*tensors: Tensor | None) -> bool:
    """Whether a backward pass on the CPU may follow: there, to make z again costs more than to keep it."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            # A trace is for both: torch.jit.trace checks one that was made with grad mode on without it.
            return tensor.is_cpu and (torch.compiler.is_compiling() or not torch.jit.is_tracing())
    return False


def _check_residual(residual: object, x: Tensor) -> None:
    if not isinstance(residual, Tensor):
        _CONTRACT.refuse("residual", "a tensor or None", type(residual).__name__)
    _CONTRACT.check_floating("residual", residual, x)
    _CONTRACT.check_shape("residual", residual, x.shape, f"{list(x.shape)}, like x")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"adapter_bottleneck: {name} must be a number, got {value!r}") from None


def _check(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    factor: float,
    dropout_p: float,
    activation: str,
    residual_is_x: bool,
    keep: bool,
    backend: str | None,
) -> list[Spec]:
    contract = _CONTRACT
    contract.check_kernel_dtype("x", x)
    if x.dim() == 0:
        contract.fail("x", "[..., C]", [])
    channels = x.shape[-1]
    if down_weight.dim() != 2 or down_weight.shape[1] != channels or down_weight.shape[0] == 0:
        contract.fail("down_weight", f"[H, C] with C={channels}, H of at least 1", list(down_weight.shape))
    hidden = down_weight.shape[0]
    contract.check_shape("up_weight", up_weight, (channels, hidden), f"[C, H] = [{channels}, {hidden}]")
    if down_bias is not None:
        contract.check_shape("down_bias", down_bias, (hidden,), f"[H] = [{hidden}]")
    if up_bias is not None:
        contract.check_shape("up_bias", up_bias, (channels,), f"[C] = [{channels}]")
    if residual is not None:
        contract.check_shape("residual", residual, x.shape, f"{list(x.shape)}, like x")
    if scale is not None and scale.numel() != 1:
        contract.fail("scale", "a number or a tensor of one element", list(scale.shape))
    parameters = {
        "down_weight": down_weight,
        "down_bias": down_bias,
        "up_weight": up_weight,
        "up_bias": up_bias,
    }
    for name, tensor in {**parameters, "residual": residual, "scale": scale}.items():
        if tensor is not None:
            contract.check_floating(name, tensor, x)
    if seed is not None:
        contract.check_whole("seed", seed, x)
        contract.check_shape("seed", seed, (1,), "[1]")
    if activation not in ACTIVATIONS:
        contract.fail("activation", "'relu', 'gelu' or 'silu'", repr(activation))
    if not 0 <= dropout_p <= 1:
        contract.fail("dropout_p", "a probability between 0 and 1", dropout_p)
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a size that is to be dynamic
    return [(x.shape, x.dtype), ((rows, hidden) if keep else (0, hidden), native.accumulator(x.dtype))]


def _limits(backend: str, x: Tensor, down_weight: Tensor, *others: Tensor | None) -> str | None:
    if backend == "triton" and down_weight.shape[0] > MOST_HIDDEN:
        return f"down_weight must have at most {MOST_HIDDEN} hidden units, got {down_weight.shape[0]}"
    return None


def _plan(backend: str, *inputs: Any) -> Plan:
    factor, dropout_p, activation, residual_is_x, keep, _ = inputs[8:]
    if backend == "triton":
        from vitkern.ops import triton_adapter_bottleneck as triton

        return triton.plan(triton.Options(factor, dropout_p, activation, residual_is_x), keep)
    x = inputs[0]
    host, total = native.host(backend, x.device), native.accumulator(x.dtype)
    options = {
        "activation": activation,
        "factor": factor,
        "residual_is_x": residual_is_x,
        "threshold": reference.dropout_threshold(dropout_p),
        "rescale": reference.dropout_rescale(dropout_p),
    }
    # Gradients of parameters are sums over all rows.
    likes = [inputs[at] for at in _DIFFERENTIABLE]
    gradients = [
        ((0,) if like is None else like.shape, total if at else x.dtype) for at, like in enumerate(likes)
    ]
    return Plan(
        host.adapter_bottleneck_forward(native.specs(x.dtype, *_check(*inputs)), **options),
        host.adapter_bottleneck_backward(native.specs(x.dtype, *gradients), **options),
    )


def _dtypes(x: Tensor, *others: Tensor | None) -> dict[int, torch.dtype]:
    return {_SCALE: native.accumulator(x.dtype)}


def _reference(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    factor: float,
    dropout_p: float,
    activation: str,
    residual_is_x: bool,
    keep: bool,
) -> Tensor:
    def formula(
        x: Tensor,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        beside = x if residual_is_x else residual
        times = factor if scale is None else factor * scale.to(x.dtype).view(())
        return reference.adapter_bottleneck(
            x, down_weight, down_bias, up_weight, up_bias, beside, times, seed, dropout_p, activation
        )

    parameters = (down_weight, down_bias, up_weight, up_bias, residual)
    return accumulated(formula, x, *(None if each is None else each.to(x.dtype) for each in parameters))


_DIFFERENTIABLE = (0, 1, 2, 3, 4, 6)
_RESIDUAL, _SCALE = 5, 6

adapter_bottleneck = Op(
    "adapter_bottleneck",
    "Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? residual, "
    "Tensor? scale, Tensor? seed, float factor=1.0, float dropout_p=0.0, str activation='relu', "
    f"bool residual_is_x=False, bool keep=False, {BACKEND}",
    defaults=(1.0, 0.0, "relu", False, False, None),
    differentiable=_DIFFERENTIABLE,
    passed_on=(_RESIDUAL,),
    check=_check,
    plan=_plan,
    limits=_limits,
    dtypes=_dtypes,
    reference=_reference,
    kept=1,
)
