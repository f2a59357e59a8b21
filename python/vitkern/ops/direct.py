# SPDX-License-Identifier: Apache-2.0
"""The short way into a kernel, for when nothing but autograd watches.

The dispatcher's way to an op with a Python implementation costs several times what a small kernel takes. It is there
for compilers, exporters, tracers, transforms, profilers and tensor subclasses. Where none of them is at work, the
public functions call the implementation themselves, under an ``autograd.Function`` if a gradient is wanted. Both ways
share the implementation and the formula of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vitkern import _C

# A small call has but microseconds: names are looked up once, here.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_included = torch._C._dispatch_tls_is_dispatch_key_included
_profiling = torch.autograd._profiler_enabled
# On while autograd takes a batch of gradients at once: its tensors are of a plain type, but not plain.
_BATCHES: Any = torch._C._parse_dispatch_key("VmapMode")


def _forward_ad() -> int:
    """The level of forward-mode differentiation, -1 outside of any."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1)


def nothing_traces() -> bool:
    """Whether tensors made now are plain ones, in no world of a compiler, a tracer or a transform."""
    return not (_is_compiling() or _dispatch_modes() or _tracing()) and _transform() is None


def nothing_watches() -> bool:
    """Whether an op on plain tensors would go through the dispatcher unseen."""
    if _is_compiling() or _dispatch_modes() or _function_modes() or _profiling() or _included(_BATCHES):
        return False
    return not _tracing() and _transform() is None and _forward_ad() < 0


def _describe(tensors: tuple[Tensor | None, ...]) -> Hashable | None:
    """What Describer says of tensors (csrc/describe.h), asked attribute by attribute."""
    key: list[object] = []
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            continue
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            return None
        if tensor.is_neg() or tensor._is_zerotensor():
            return None
        key.append((tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()))
    return tuple(key)


# Types, devices, shapes of tensors and whether they are contiguous, as a key; None if one is not what memory holds: of
# another type, lazily negated or zero, sparse, or without elements to read.
describe: Callable[[tuple[Tensor | None, ...]], Hashable | None] = (
    _C.Describer(Tensor.__dlpack_c_exchange_api__, Tensor, Parameter)
    if hasattr(Tensor, "__dlpack_c_exchange_api__")
    else _describe
)


def refuse_transforms(op: str) -> None:
    """Derivatives that the kernels do not have would come back as zeros or None in some releases: say so instead."""
    if _forward_ad() >= 0:
        raise NotImplementedError(f"vitkern.{op} has no forward-mode derivative; backend='reference' has one")
    if _is_compiling():
        return
    interpreter = _transform()
    if interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Grad:
        raise NotImplementedError(
            f"vitkern.{op} does not run under torch.func's gradients; backend='reference' does"
        )
