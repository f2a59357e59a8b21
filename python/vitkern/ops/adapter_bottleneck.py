# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vitkern.adapter_bottleneck: what it asks of its arguments, and its launches.

The public, documented function is in ``vitkern.functional``. Here the scale is ``factor`` times the tensor ``scale``, a
seed means dropout, ``residual_is_x`` spares the second pass over a gradient of x's size, and ``keep`` asks forward to
keep z, eq. (1), for backward, which works it out again where it is not given.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from vitkern import reference
from vitkern.ops import native
from vitkern.ops.checks import Contract
from vitkern.ops.op import BACKEND, Op, kernel
from vitkern.ops.plain import accumulated

# Mirrors csrc/adapter_bottleneck/params.h.
ACTIVATION_CODES = {"relu": 0, "gelu": 1, "silu": 2}

_CONTRACT = Contract("adapter_bottleneck", "x")


class AdapterBottleneckCall(NamedTuple):
    """What the kernels are launched on: contiguous, of one dtype."""

    x: Tensor  # [N, C]
    down_weight: Tensor  # [H, C]
    down_bias: Tensor | None  # [H]
    up_weight: Tensor  # [C, H]
    up_bias: Tensor | None  # [C]
    residual: Tensor | None  # [N, C]
    scale: Tensor | None  # [1], the accumulator's type
    seed: Tensor | None  # [1] int64
    factor: float
    dropout_p: float
    activation: str
    residual_is_x: bool


def check_tensors(x, down_weight, down_bias, up_weight, up_bias, residual) -> None:
    """What has to hold before the public function looks at them; a residual of another dtype never meets the op."""
    for name, tensor in {"x": x, "down_weight": down_weight, "up_weight": up_weight}.items():
        if not isinstance(tensor, Tensor):
            _CONTRACT.refuse(name, "a tensor", type(tensor).__name__)
    for name, tensor in {"down_bias": down_bias, "up_bias": up_bias, "residual": residual}.items():
        if not (tensor is None or isinstance(tensor, Tensor)):
            _CONTRACT.refuse(name, "a tensor or None", type(tensor).__name__)
    if residual is not None and residual is not x and residual.dtype != x.dtype:
        _CONTRACT.check_floating("residual", residual, x)
        _CONTRACT.check_shape("residual", residual, x.shape, f"{list(x.shape)}, like x")


def number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"adapter_bottleneck: {name} must be a number, got {value!r}") from None


def _check(
    x, down_weight, down_bias, up_weight, up_bias, residual, scale, seed,
    factor, dropout_p, activation, residual_is_x, keep, backend,
):  # fmt: skip
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
    if activation not in ACTIVATION_CODES:
        contract.fail("activation", "'relu', 'gelu' or 'silu'", repr(activation))
    if not 0 <= dropout_p <= 1:
        contract.fail("dropout_p", "a probability between 0 and 1", dropout_p)
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a size that is to be dynamic
    return (x.shape, x.dtype), ((rows, hidden) if keep else (0, hidden), native.accumulator(x.dtype))


class _Plan(NamedTuple):
    backend: str
    options: tuple[float, float, str, bool]  # as AdapterBottleneckCall ends with them
    keep: bool


def _plan(backend, *inputs) -> _Plan:
    factor, dropout_p, activation, residual_is_x, keep, _ = inputs[8:]
    return _Plan(backend, (factor, dropout_p, activation, residual_is_x), keep)


def _ready(tensor: Tensor | None, like: Tensor, *shape: int) -> Any:
    """Contiguous, of like's dtype, None where there is none."""
    if tensor is None:
        return None
    return tensor.to(like.dtype).reshape(shape or tensor.shape).contiguous()


def _call(
    plan, x, down_weight, down_bias, up_weight, up_bias, residual, scale, seed
) -> AdapterBottleneckCall:
    rows, channels = x.shape[:-1].numel(), x.shape[-1]
    return AdapterBottleneckCall(
        _ready(x, x, rows, channels),
        _ready(down_weight, x),
        _ready(down_bias, x),
        _ready(up_weight, x),
        _ready(up_bias, x),
        _ready(residual, x, rows, channels),
        None if scale is None else scale.to(native.accumulator(x.dtype)).reshape(1),
        seed,
        *plan.options,
    )


def _forward(plan):
    launch = kernel("adapter_bottleneck", "forward", plan.backend)

    def forward(x, *others):
        call = _call(plan, x, *others)
        output, kept = launch(call, plan.keep)
        if kept is None:
            kept = x.new_empty((0, call.down_weight.shape[0]), dtype=native.accumulator(x.dtype))
        # A view could not be changed in place: autograd would lose the gradient.
        return output.resize_(x.shape), kept

    return forward


def _backward(plan, grad_output, needed, *tensors_and_kept):
    *tensors, kept = tensors_and_kept
    call = _call(plan, *tensors)
    launch = kernel("adapter_bottleneck", "backward", plan.backend)
    gradients = launch(call, grad_output.view(call.x.shape), kept if plan.keep else None, needed)
    likes = (tensors[position] for position in _DIFFERENTIABLE)
    return [
        None if gradient is None else gradient.view(like.shape) for gradient, like in zip(gradients, likes)
    ]


def _reference(
    x, down_weight, down_bias, up_weight, up_bias, residual, scale, seed,
    factor, dropout_p, activation, residual_is_x, keep,
):  # fmt: skip
    def formula(x, down_weight, down_bias, up_weight, up_bias, residual):
        beside = x if residual_is_x else residual
        times = factor if scale is None else factor * scale.to(x.dtype).view(())
        return reference.adapter_bottleneck(
            x, down_weight, down_bias, up_weight, up_bias, beside, times, seed, dropout_p, activation
        )

    parameters = (_ready(t, x) for t in (down_weight, down_bias, up_weight, up_bias, residual))
    return accumulated(formula, x, *parameters)


_DIFFERENTIABLE = (0, 1, 2, 3, 4, 6)
_RESIDUAL = 5

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
    forward=_forward,
    backward=_backward,
    reference=_reference,
    kept=1,
)
