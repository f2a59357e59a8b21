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


def nothing_watches(*tensors: Tensor) -> bool:
    """Whether an op on these tensors would go through the dispatcher unseen."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )
