# SPDX-License-Identifier: Apache-2.0
"""Whether results are those of the formula in float64: no figure is given of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of the greatest value of a result. Kernels are held to plain torch's own error by the tests; this is the check that
# fits into a benchmark, of a right kernel on any input, and wrong maths misses it by an order of magnitude.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def relative_error(got: Tensor, want: Tensor) -> float:
    """The greatest difference, as a share of the greatest value that is wanted. Infinite for what is not finite."""
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    if want.numel() == 0:
        return 0.0
    difference = (got.double() - want.double()).abs().max()
    return (difference / want.double().abs().max().clamp(min=1e-30)).item()


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Output and the gradient of each input, computed in `kind`."""
    leaves = [tensor.detach().to(kind).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    grad_output = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    # Rounded to what the inputs are, so that all kinds start from the same numbers.
    grad_output = grad_output.to(inputs[0].dtype).to(kind)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def agree(
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> bool:
    """Whether output and gradients are those of the formula in float64, as far as the dtype can tell."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    ours, exact = results(function, rounded, dtype), results(formula, rounded, torch.float64)
    return all(relative_error(a, b) <= LIMITS[dtype] for a, b in zip(ours, exact))
