# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.adapter_bottleneck: the checks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``. Here the scale is ``factor`` times the tensor ``scale``, a
seed means dropout, ``residual_is_x`` saves the second pass over a gradient of x's size, and with ``keep`` forward keeps
z, eq. (1), for backward, which otherwise computes z again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitkern import _C, reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.op import Op
from vitkern.ops.plain import accumulated
from vitkern.ops.plan import Plan, Spec

ACTIVATIONS = ("relu", "gelu", "silu")

_CONTRACT = Contract("adapter_bottleneck", "x")
MOST_HIDDEN = 512  # of the Triton kernels
_SEEDS = 2**63 - 1  # above all that dropout draws


class Inputs(NamedTuple):
    x: Tensor  # [..., C]: N rows
    down_weight: Tensor  # [H, C]
    down_bias: Tensor | None  # [H]
    up_weight: Tensor  # [C, H]
    up_bias: Tensor | None  # [C]
    residual: Tensor | None  # like x
    scale: Tensor | None  # one number
    seed: Tensor | None  # [1] int64
    factor: float = 1.0
    dropout_p: float = 0.0
    activation: str = "relu"
    residual_is_x: bool = False
    keep: bool = False
    backend: str | None = None

    @property
    def rows(self) -> int:
        return math.prod(self.x.shape[:-1])  # Size.numel() would fix a dynamic size

    @property
    def hidden(self) -> int:
        return self.down_weight.shape[0]


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
    """Calls the op after a seed was drawn; z is kept if a backward pass may follow.

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
    """Whether to keep z: a backward pass on the CPU may follow, where recomputing z costs more than keeping it."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            # A trace serves both: torch.jit.trace makes it with grad mode on and checks it without.
            return tensor.is_cpu and (torch.compiler.is_compiling() or not torch.jit.is_tracing())
    return False


def _check_residual(residual: object, x: Tensor) -> None:
    if not isinstance(residual, Tensor):
        _CONTRACT.refuse("residual", "a tensor or None", type(residual).__name__)
    _CONTRACT.check_floating("residual", residual, x)
    _CONTRACT.check_shape("residual", residual, x.shape, f"{list(x.shape)}, like x")


def _number(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"adapter_bottleneck: {name} must be a number, got {value!r}") from None


def _check(inputs: Inputs) -> list[Spec]:
    contract, x, weight = _CONTRACT, inputs.x, inputs.down_weight
    contract.check_kernel_dtype("x", x)
    if x.dim() == 0:
        contract.fail("x", "[..., C]", [])
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
        contract.fail("down_weight", f"[H, C] with C={channels}, H of at least 1", list(weight.shape))
    hidden = inputs.hidden
    shapes: dict[str, tuple[Sequence[int], str]] = {
        "down_weight": (weight.shape, ""),
        "up_weight": ((channels, hidden), f"[C, H] = [{channels}, {hidden}]"),
        "down_bias": ((hidden,), f"[H] = [{hidden}]"),
        "up_bias": ((channels,), f"[C] = [{channels}]"),
        "residual": (x.shape, f"{list(x.shape)}, like x"),
    }
    given = {name: tensor for name in shapes if (tensor := getattr(inputs, name)) is not None}
    for name, tensor in given.items():
        contract.check_shape(name, tensor, *shapes[name])
    if inputs.scale is not None:
        if inputs.scale.numel() != 1:
            contract.fail("scale", "a number or a tensor of one element", list(inputs.scale.shape))
        given["scale"] = inputs.scale
    for name, tensor in given.items():
        contract.check_floating(name, tensor, x)
    if inputs.seed is not None:
        contract.check_whole("seed", inputs.seed, x)
        contract.check_shape("seed", inputs.seed, (1,), "[1]")
    if inputs.activation not in ACTIVATIONS:
        contract.fail("activation", "'relu', 'gelu' or 'silu'", repr(inputs.activation))
    if not 0 <= inputs.dropout_p <= 1:
        contract.fail("dropout_p", "a probability between 0 and 1", inputs.dropout_p)
    kept = (inputs.rows if inputs.keep else 0, hidden)
    return [(x.shape, x.dtype), (kept, native.accumulator(x.dtype))]


def _limits(backend: str, inputs: Inputs) -> str | None:
    if backend == "triton" and inputs.hidden > MOST_HIDDEN:
        return f"down_weight must have at most {MOST_HIDDEN} hidden units, got {inputs.hidden}"
    return None


def _plan(backend: str, inputs: Inputs, outputs: Sequence[Spec]) -> Plan:
    if backend == "triton":
        from vitkern.ops import triton_adapter_bottleneck as triton

        return triton.plan(inputs)
    dtype = inputs.x.dtype
    host, total = native.host(backend, inputs.x.device), native.accumulator(dtype)
    options: _C.AdapterOptions = {
        "activation": inputs.activation,
        "factor": inputs.factor,
        "residual_is_x": inputs.residual_is_x,
        "threshold": reference.dropout_threshold(inputs.dropout_p),
        "rescale": reference.dropout_rescale(inputs.dropout_p),
    }
    # Gradients of parameters are sums over all rows.
    likes = {name: getattr(inputs, name) for name in _DIFFERENTIABLE}
    gradients = [
        ((0,) if like is None else like.shape, dtype if name == "x" else total)
        for name, like in likes.items()
    ]
    return Plan(
        host.adapter_bottleneck_forward(native.specs(dtype, *outputs), **options),
        host.adapter_bottleneck_backward(native.specs(dtype, *gradients), **options),
    )


def _dtypes(inputs: Inputs) -> dict[str, torch.dtype]:
    return {"scale": native.accumulator(inputs.x.dtype)}


def _reference(inputs: Inputs) -> Tensor:
    seed, dropout_p, activation = inputs.seed, inputs.dropout_p, inputs.activation

    def formula(
        x: Tensor,
        w_d: Tensor,
        b_d: Tensor | None,
        w_u: Tensor,
        b_u: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        beside = x if inputs.residual_is_x else residual
        scale: float | Tensor = inputs.factor
        if inputs.scale is not None:
            scale = inputs.factor * inputs.scale.to(x.dtype).view(())
        return reference.adapter_bottleneck(x, w_d, b_d, w_u, b_u, beside, scale, seed, dropout_p, activation)

    x, *parameters = inputs[:6]
    return accumulated(formula, x, *(None if each is None else each.to(x.dtype) for each in parameters))


_DIFFERENTIABLE = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "scale")

adapter_bottleneck = Op(
    "adapter_bottleneck",
    Inputs,
    differentiable=_DIFFERENTIABLE,
    passed_on="residual",
    check=_check,
    plan=_plan,
    limits=_limits,
    dtypes=_dtypes,
    reference=_reference,
    kept=1,
    flops=lambda x, down_weight, *_: 4 * math.prod(x) * down_weight[0],
)
