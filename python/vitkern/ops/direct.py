# SPDX-License-Identifier: Apache-2.0
"""The short way into a kernel, for when nothing but autograd watches.

The dispatcher's way to an op with a Python implementation costs several times what a small kernel takes. It is there
for compilers, exporters, tracers, transforms, profilers and tensor subclasses. Where none of them is at work, the
public functions call the implementation themselves, under an ``autograd.Function`` if a gradient is wanted. Both ways
share the implementation and the formula of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def nothing_traces() -> bool:
    """Whether tensors made now are plain ones, in no world of a compiler, a tracer or a transform."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
    )


def _is_what_memory_holds(tensor: Tensor) -> bool:
    """Lazily negated or zero tensors and batches of ``is_grads_batched`` are of a plain type, but not plain."""
    return not (
        tensor.is_meta
        or tensor.is_neg()
        or tensor._is_zerotensor()
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def nothing_watches(*tensors: Tensor) -> bool:
    """Whether an op on these tensors would go through the dispatcher unseen."""
    if not nothing_traces():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not _is_what_memory_holds(tensor):
            return False
    return torch._C._len_torch_function_stack() == 0 and not torch.autograd._profiler_enabled()
