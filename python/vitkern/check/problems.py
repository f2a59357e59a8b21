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
    MsDeformAttnCase,
    MsDeformAttnInputs,
    TokenCase,
    make_inputs,
)

Function = Callable[..., Tensor]
# Pixels from a cell's edge: gradients of locations jump there, and two dtypes may round to either side.
MARGIN = 0.15
SPREAD = 1.4  # of the locations round the middle: some lie outside


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


def off_edges(locations: Tensor, spatial_shapes: Tensor) -> Tensor:
    """Locations [..., L, P, 2], moved so far from the edges of cells that all dtypes agree on the cell."""
    width_height = spatial_shapes.flip(-1).double()[:, None]
    pixels = locations * width_height - 0.5
    cell = pixels.floor()
    return (cell + (pixels - cell).clamp(MARGIN, 1 - MARGIN) + 0.5) / width_height.clamp(min=1)


def attention_inputs(case: MsDeformAttnCase, device: str, seed: int) -> MsDeformAttnInputs:
    """Locations anywhere in the maps and some outside, off the edges of cells."""
    inputs = make_inputs(case, locations="uniform", dtype=torch.float64, device=device, seed=seed)
    places = (inputs.sampling_locations - 0.5) * SPREAD + 0.5
    inputs.sampling_locations = off_edges(places, inputs.spatial_shapes)
    return inputs


def ms_deform_attn(case: Case, device: str, seed: int, **options: Any) -> Problem:
    assert isinstance(case, MsDeformAttnCase)
    inputs = attention_inputs(case, device, seed)
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
    inputs = attention_inputs(case, device, seed)
    tables = inputs.spatial_shapes, inputs.level_start_index
    places = inputs.sampling_locations  # [B, Q, M, L, P, 2]
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (*places.shape[:2], len(case.levels), 2)
    points = (torch.rand(shape, generator=generator, dtype=torch.float64) * 0.6 + 0.2).to(device)
    sizes = inputs.spatial_shapes.flip(-1)[:, None]
    logits = torch.randn(inputs.attention_weights.flatten(3).shape, generator=generator, dtype=torch.float64)
    offsets = (places - points[:, :, None, :, None]) * sizes
    names = ("value", "reference_points", "offsets", "logits")

    def by_grid_sample(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        places = points[:, :, None, :, None] + offsets / sizes
        return reference.ms_deform_attn_by_grid_sample(value, list(case.levels), places, weights)

    return Problem(
        dict(zip(names, (inputs.value, points, offsets, logits.to(device)))),
        lambda value, *rest, backend: vitkern.ms_deform_attn_fused(
            value,
            *tables,
            *rest,
            backend=backend,
            **options,
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
        return vitkern.adapter_bottleneck(
            *first,
            residual=residual,
            scale=scale,
            backend=backend,
            **options,
        )

    def other(*tensors: Tensor) -> Tensor:
        if options.get("training"):
            return call(*tensors, backend="reference")  # nobody else draws the same mask
        x, down_weight, down_bias, up_weight, up_bias, residual, scale = tensors
        activation = {"gelu": torch.special.erf, "silu": torch.sigmoid}.get(str(options.get("activation")))
        hidden = x @ down_weight.mT + down_bias
        if activation is None:
            hidden = hidden.clamp(min=0)
        elif activation is torch.special.erf:
            hidden = hidden * (1 + activation(hidden / 2**0.5)) / 2
        else:
            hidden = hidden * activation(hidden)
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
