# SPDX-License-Identifier: Apache-2.0
"""Each op on the inputs of a case in float64, every input with a gradient, locations off the edges of cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import reference
from vitkern.cases import (
    AdapterBottleneckCase,
    Case,
    Function,
    MsDeformAttnCase,
    TokenCase,
    fused_inputs,
    locations_of,
    off_edge_inputs,
)

# An activation of x is x times this.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "gelu": lambda x: (1 + torch.special.erf(x / 2**0.5)) / 2,
    "silu": torch.sigmoid,
}


@dataclass
class Problem:
    inputs: dict[str, Tensor]  # float64
    call: Function  # of the inputs, and backend= where it is vitkern's own
    other: Function  # the same by other functions of torch, which the reference is held to
    coordinates: tuple[str, ...] = ()  # inputs that stay float32 beside 16-bit ones
    # Results that are one long sum: plain torch's error in one number is a matter of luck, so the magnitude of the
    # terms, as a function of the output, has a say too.
    sums: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.dtype_of(name, dtype)) for name, tensor in self.inputs.items())

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if name in self.coordinates else dtype


def ms_deform_attn(case: Case, device: str, seed: int, **options: Any) -> Problem:
    assert isinstance(case, MsDeformAttnCase)
    inputs = off_edge_inputs(case, device=device, seed=seed)
    tables = inputs.spatial_shapes, inputs.level_start_index
    names = ("value", "locations", "weights")
    return Problem(
        dict(zip(names, inputs.differentiable())),
        lambda value, *rest, backend: vitkern.ms_deform_attn(
            value, *tables, *rest, backend=backend, **options
        ),
        lambda value, *rest: reference.ms_deform_attn_by_grid_sample(value, list(case.levels), *rest),
        names[1:],
    )


def ms_deform_attn_fused(case: Case, device: str, seed: int, **options: Any) -> Problem:
    """Reference points anywhere in the middle, offsets from there to the places of the plain form."""
    assert isinstance(case, MsDeformAttnCase)
    inputs = off_edge_inputs(case, device=device, seed=seed)
    tables = inputs.spatial_shapes, inputs.level_start_index
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (case.batch, case.query_count, len(case.levels), 2)
    points = (torch.rand(shape, generator=generator, dtype=torch.float64) * 0.6 + 0.2).to(device)
    names = ("value", "reference_points", "offsets", "logits")

    def by_grid_sample(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        locations = locations_of(points, offsets, tables[0])
        return reference.ms_deform_attn_by_grid_sample(value, list(case.levels), locations, weights)

    return Problem(
        dict(zip(names, fused_inputs(inputs, points, generator))),
        lambda value, *rest, backend: vitkern.ms_deform_attn_fused(
            value, *tables, *rest, backend=backend, **options
        ),
        by_grid_sample,
        names[1:],
    )


def adapter_bottleneck(case: Case, device: str, seed: int, **options: Any) -> Problem:
    assert isinstance(case, AdapterBottleneckCase)
    inputs = case.make(dtype=torch.float64, device=device, seed=seed)

    def call(*tensors: Tensor, backend: str) -> Tensor:
        torch.manual_seed(seed)  # the same dropout each time
        *first, residual, scale = tensors
        return vitkern.adapter_bottleneck(*first, residual=residual, scale=scale, backend=backend, **options)

    def other(*tensors: Tensor) -> Tensor:
        if options.get("training"):
            return call(*tensors, backend="reference")  # nobody else draws the same mask
        x, down_weight, down_bias, up_weight, up_bias, residual, scale = tensors
        hidden = x @ down_weight.mT + down_bias
        hidden = hidden * GATES[options.get("activation", "relu")](hidden)
        return residual + scale * (hidden @ up_weight.mT + up_bias)

    terms = {"gradient of scale": lambda output: (output - inputs["residual"]).abs().sum() / 4}
    return Problem(inputs, call, other, sums=terms)


def token_pool(case: Case, device: str, seed: int, **options: Any) -> Problem:
    assert isinstance(case, TokenCase)
    tensors = case.make_pool(device=device, seed=seed, recurrent=bool(options.get("recurrent")))
    return Problem(
        dict(zip(("x", "weight"), tensors)),
        lambda x, weight, backend: vitkern.token_pool(x, weight, backend=backend),  # type: ignore[arg-type,return-value]
        lambda x, weight: torch.nn.functional.scaled_dot_product_attention(
            weight.expand(len(x), -1, -1), x, x, scale=1.0
        ),
    )


def token_project(case: Case, device: str, seed: int, **options: Any) -> Problem:
    assert isinstance(case, TokenCase)
    tensors = case.make_project(device=device, seed=seed)
    return Problem(
        dict(zip(("x", "query", "key", "tokens"), tensors)),
        lambda *tensors, backend: vitkern.token_project(*tensors, backend=backend),
        lambda x, query, key, tokens: (
            x + torch.nn.functional.scaled_dot_product_attention(query, key, tokens, scale=1.0)
        ),
    )
