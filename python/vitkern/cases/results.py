# SPDX-License-Identifier: Apache-2.0
"""The results of a function: its output and its gradients."""

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
    """[output, *gradient of each input]. The output's gradient is `grad_output`, or its result for the output, or ones.

    It is cast to the output's dtype. A missing gradient is one of zeros, which fails where the formula has others.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]  # a clone would have other strides
    output = function(*leaves)
    given = torch.ones_like(output) if grad_output is None else grad_output
    given = given if isinstance(given, Tensor) else given(output)
    gradients = torch.autograd.grad(output, leaves, given.to(output.dtype), materialize_grads=True)
    return [output.detach(), *gradients]
