# SPDX-License-Identifier: Apache-2.0
"""What a function makes of inputs, and of the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def results(
    function: Function,
    inputs: Sequence[Tensor],
    grad_output: Tensor | Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """[output, *gradient of each input]. `grad_output`, or what it makes of the output, or ones, in the output's dtype.

    A gradient that is not there is one of zeros, which are missed where the formula has others.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]  # a clone would have other strides
    output = function(*leaves)
    given = torch.ones_like(output) if grad_output is None else grad_output
    given = given if isinstance(given, Tensor) else given(output)
    gradients = torch.autograd.grad(output, leaves, given.to(output.dtype), materialize_grads=True)
    return [output.detach(), *gradients]
