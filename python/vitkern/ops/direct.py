# SPDX-License-Identifier: Apache-2.0
"""The short way into a kernel, for when nothing but autograd watches.

The dispatcher's way to an op with a Python implementation costs several times what a small kernel takes. It is there
for compilers, exporters, tracers, transforms, profilers and tensor subclasses. Where none of them is at work, the
public functions call the implementation themselves, under an ``autograd.Function`` if a gradient is wanted. Both ways
share the implementation and the formula of the gradient.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from vitkern import _C
from vitkern.ops.checks import Seen

# A small call has but microseconds: names are looked up once, here.
is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing
_profiling = torch.autograd._profiler_enabled


# Functions without arguments; where any has a true answer, the dispatcher has to see a call.
_watchers = (_dispatch_modes, _function_modes, _profiling, _tracing, _transform)
# Where forward-mode differentiation keeps its level, -1 outside of any, under this name.
_forward_ad_state, _LEVEL = vars(torch.autograd.forward_ad), "_current_level"
watched = _C.Watch(_watchers, _forward_ad_state)


def _forward_ad() -> bool:
    return _forward_ad_state.get(_LEVEL, -1) >= 0


def nothing_traces() -> bool:
    """Whether tensors made now are plain ones, in no world of a compiler, a tracer or a transform."""
    return not (is_compiling() or _dispatch_modes() or _tracing()) and _transform() is None


def nothing_watches() -> bool:
    """Whether an op on plain tensors would go through the dispatcher unseen."""
    return not (is_compiling() or watched())


# Device types, and type codes and bits, as DLPack counts them: of the tensors that a short way may lead.
_DEVICES = {"cpu": 1, "cuda": 2}
_TYPES = {
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
}


def _tell(tensor: Tensor) -> tuple[Any, ...] | None:
    """What DLPack's C exchange API tells of a tensor (csrc/host/lend.h), asked attribute by attribute."""
    device, code = _DEVICES.get(tensor.device.type), _TYPES.get(tensor.dtype)
    if device is None or code is None or tensor.layout != torch.strided or tensor._is_zerotensor():
        return None
    return tensor.data_ptr(), device, max(tensor.get_device(), 0), *code, tensor.shape, tensor.stride()


# What compiled code asks about a tensor's memory.
lends = getattr(Tensor, "__dlpack_c_exchange_api__", _tell)


def _room(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its storage."""
    return tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.element_size()


def _storage_functions() -> tuple[int, ...] | None:
    """Addresses of torch's C functions that tell the same (csrc/host/lend.h), where its library has them."""
    names = "aoti_torch_get_storage_size", "aoti_torch_get_storage_offset"
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / library
        with contextlib.suppress(AttributeError, OSError):
            loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # torch's own, or none
            return tuple(ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in names)
    return None


# The quickest way to ask that this torch has.
room = (hasattr(Tensor, "_cdata") and _storage_functions()) or _room

# Types, devices, shapes of tensors and whether they are contiguous, as a key; None if one is not what memory holds: of
# another type, lazily negated or zero, sparse, or larger than its storage.
describe = _C.Describer(lends, room, Tensor, Parameter)


class Planned(NamedTuple):
    """What csrc/host/short_way.h finds for a call."""

    run: Callable[..., Any]  # of the tensors
    record: Callable[..., Any]  # of those that may want a gradient, and all in a tuple: gives the result
    record_all: Callable[..., Any]  # the same, gives all outputs
    plan: Any


class Recorded(NamedTuple):
    """The facts about a forward pass that its backward needs."""

    options: tuple
    saved: tuple[Seen | None, ...]  # what the tensors were that backward wants again
    plan: Any = None
    described: tuple[bytes, ...] = ()  # of grad_output and these tensors, where the plan serves


def without(tensors: tuple, positions: tuple[int, ...]) -> tuple:
    """The tensors with None at these positions."""
    return tuple(None if at in positions else tensor for at, tensor in enumerate(tensors))


def recorder(
    name: str,
    run: Callable[..., Any],
    differentiate: Callable[..., Any],
    unsaved: tuple[int, ...],
    keep: Callable[..., tuple] | None,
    everything: bool,
) -> Callable[..., Any]:
    """Forward and gradient of one plan without the dispatcher between them: see Planned.

    differentiate: of ctx and grad_output; returns gradients of the tensors that may want one.
    unsaved: positions of tensors that the backward pass does not want.
    keep: of ctx and the outputs, what autograd saves of them; None: there is one output, which is not saved.
    """

    # Each tensor among its arguments costs, and so does each attribute of ctx: all tensors come in a tuple.
    def forward(ctx, *inputs):
        tensors = inputs[-1]
        outputs = run(*tensors)
        if unsaved:
            tensors = without(tensors, unsaved)
        if keep is None:
            ctx.save_for_backward(*tensors)
            return outputs
        ctx.save_for_backward(*tensors, *keep(ctx, outputs))
        if not everything:
            return outputs[0]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    def backward(ctx, grad_output, *_):
        return *differentiate(ctx, grad_output), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    # Function.apply itself first looks for torch.func's wrappers, of which there are none on this way.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def refuse_transforms(op: str) -> None:
    """Derivatives that the kernels do not have would come back as zeros or None in some releases: say so instead."""
    if _forward_ad():
        raise NotImplementedError(f"vitkern.{op} has no forward-mode derivative; backend='reference' has one")
    if is_compiling():
        return
    interpreter = _transform()
    if interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Grad:
        raise NotImplementedError(
            f"vitkern.{op} does not run under torch.func's gradients; backend='reference' does"
        )
