# SPDX-License-Identifier: Apache-2.0
"""Whether results are those of the formula in float64: wrong results get no figures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitkern.cases import Function, results
from vitkern.cases.record import Problem

# As a share of the largest value of a result. The tests hold kernels to plain torch's own error. This check fits into
# a benchmark: a right kernel passes on any input, and wrong maths fails by an order of magnitude.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest expected value. Infinite for results that are not finite."""
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    if want.numel() == 0:
        return 0.0
    difference = (got.double() - want.double()).abs().max()
    return (difference / want.double().abs().max().clamp(min=1e-30)).item()


def results_in(kind: torch.dtype, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and the gradient of each input, computed in `kind`."""

    def grad_output(output: Tensor) -> Tensor:
        # Rounded to the dtype of the inputs, so that all kinds start from the same numbers.
        ramp = torch.linspace(-1, 1, output.numel(), device=output.device)
        return ramp.view(output.shape).to(inputs[0].dtype)

    return results(function, [tensor.to(kind) for tensor in inputs], grad_output)


def exact_results(work: Problem) -> list[Tensor]:
    return results_in(torch.float64, _formula(work), tuple(work.inputs.values()))


def _formula(work: Problem) -> Function:
    """Heads are independent, and one at a time takes a fraction of the memory: [B, ., M, ...] each, [B, Q, M * D].

    On a card, which has less memory, the intermediate results for a head's gradients are computed again.
    """
    whole = work.implementation("reference")
    if not work.with_heads:
        return whole

    def head_by_head(*tensors: Tensor) -> Tensor:
        heads = tensors[0].shape[2]
        one = functools.partial(checkpoint, whole, use_reentrant=False) if tensors[0].is_cuda else whole
        return torch.cat(
            [one(*(tensor[:, :, head, None] for tensor in tensors)) for head in range(heads)], -1
        )

    return head_by_head


def errors_of(function: Function, work: Problem, exact: Sequence[Tensor]) -> dict[str, float]:
    """Relative error of the output and of the gradient of each input, by name."""
    inputs = tuple(work.inputs.values())
    found = {}
    for name, got, want in zip(
        ("output", *work.inputs), results_in(inputs[0].dtype, function, inputs), exact
    ):
        if name in work.comparable:
            here = work.comparable[name](work.inputs)
            got, want = (torch.where(here, tensor, 0) for tensor in (got, want))
        found[name if name == "output" else f"gradient of {name}"] = relative_error(got, want)
    return found


def complaint(errors: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """None if all results are right, else a sentence on the wrong one."""
    name, worst = max(errors.items(), key=lambda item: item[1])
    if worst <= LIMITS[dtype]:
        return None
    return f"{name} is off by {worst:.1e} of its largest value, {LIMITS[dtype]:.0e} is allowed"


def agree(function: Function, formula: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether output and gradients are those of the formula in float64, as far as the dtype can tell."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    ours, exact = results_in(dtype, function, rounded), results_in(torch.float64, formula, rounded)
    return all(relative_error(a, b) <= LIMITS[dtype] for a, b in zip(ours, exact))
