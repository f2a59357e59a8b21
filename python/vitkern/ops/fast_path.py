# SPDX-License-Identifier: Apache-2.0
"""The fast path into a kernel, for calls that only autograd watches.

The dispatcher's path to an op that is written in Python costs several times as much as a small kernel. Compilers,
exporters, tracers, transforms, profilers and tensor subclasses need it. If none of them is active, an op calls its
kernel itself, under an ``autograd.Function`` if a gradient is needed. Both paths share the kernel and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from vitkern import _C
from vitkern.ops import private
from vitkern.ops.plan import Gradients, Outputs, Tensors

is_compiling = torch.compiler.is_compiling
_watchers, _forward_ad = private.watchers(), private.forward_ad()
# None if this torch cannot report whether something watches: then every call takes the dispatcher's path.
watched: _C.Watch | None = None
if _forward_ad is not None and None not in _watchers:
    watched = _C.Watch(tuple(_watchers), _forward_ad)

# Signature of a call's tensors: see csrc/host/signature.h.
sign = _C.Signer(private.borrow(), private.room(), Tensor, Parameter)


def nothing_traces() -> bool:
    """Whether tensors made now are plain: no compiler, tracer or transform is active."""
    modes, _, _, tracing, transform = _watchers
    if is_compiling() or modes is None or tracing is None or transform is None:
        return False
    return not (modes() or tracing()) and transform() is None


def nothing_watches() -> bool:
    """Whether nothing would see an op on plain tensors go through the dispatcher."""
    return watched is not None and not (is_compiling() or watched())


def refuse_transforms(op: str) -> None:
    """Raises for derivatives that the kernels lack: some releases would return zeros or None."""
    if _forward_ad is not None and _forward_ad.get("_current_level", -1) >= 0:
        raise NotImplementedError(f"vitkern.{op} has no forward-mode derivative; backend='reference' has one")
    if is_compiling() or _watchers.transform is None:
        return
    interpreter = _watchers.transform()
    if interpreter is not None and private.is_gradient(interpreter):
        raise NotImplementedError(
            f"vitkern.{op} does not run under torch.func's gradients; backend='reference' does"
        )


class Planned(NamedTuple):
    """The functions for calls of one signature. csrc/host/fast_path.h reads the first three."""

    run: Callable[..., Outputs]  # of the tensors
    record: Callable[
        ..., Outputs
    ]  # of those that may need a gradient, and of all in a tuple: returns the result
    record_all: Callable[..., Outputs]  # the same, returns all outputs
    backward: Callable[..., Gradients]


def without(tensors: Tensors, position: int | None) -> Tensors:
    """The tensors with None at this position."""
    return tuple(None if at == position else tensor for at, tensor in enumerate(tensors))


def recorder(
    name: str,
    run: Callable[..., Outputs],
    differentiate: Callable[..., Gradients],
    unsaved: int | None,
    keep: Callable[..., tuple[Tensor, ...]] | None,
    all_outputs: bool,
) -> Callable[..., Outputs]:
    """Forward and gradient of one plan without the dispatcher between them: see Planned.

    differentiate: of ctx and grad_output; returns gradients of the tensors that may need one.
    unsaved: position of a tensor that the backward pass does not need.
    keep: of ctx and the outputs, those that autograd saves; None: there is one output, which is not saved.
    """

    # Each tensor among the arguments costs time, and so does each attribute of ctx: all tensors come in a tuple.
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        tensors = inputs[-1]
        outputs = run(*tensors)
        if unsaved is not None:
            tensors = without(tensors, unsaved)
        if keep is None:
            ctx.save_for_backward(*tensors)
            return outputs
        ctx.save_for_backward(*tensors, *keep(ctx, outputs))
        if not all_outputs:
            return outputs[0]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *differentiate(ctx, grad_output), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return private.apply_of(type(name, (torch.autograd.Function,), methods))
