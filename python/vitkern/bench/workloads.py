# SPDX-License-Identifier: Apache-2.0
"""What is run: each op on the inputs of a case, by vitkern, by plain torch, and by the formula that checks them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vitkern
from vitkern import reference
from vitkern.cases import (
    ADAPTER_CASES,
    ATTENTION_CASES,
    TOKEN_CASES,
    AdapterBottleneckCase,
    Case,
    Function,
    MsDeformAttnCase,
    TokenCase,
    fused_inputs,
    inside_a_cell,
    locations_of,
    make_inputs,
)


@dataclass(frozen=True)
class Work:
    """Inputs that all take alike, every one of them with a gradient, and who computes the op."""

    inputs: Mapping[str, Tensor]
    vitkern: Function  # and backend=
    torch: Function  # what one writes without vitkern
    formula: Function  # in float64, the oracle
    comparable: Mapping[str, Tensor]  # of which gradients only a part can be compared, and which
    others: Mapping[str, Function] = field(default_factory=dict)  # further contenders, by name

    def implementation(self, backend: str) -> Function:
        if backend == "torch":
            return self.torch
        if backend in self.others:
            return self.others[backend]
        return lambda *tensors: self.vitkern(*tensors, backend=backend)


@dataclass(frozen=True, eq=False)
class Op:
    name: str
    cases: Mapping[str, Case]
    usual: tuple[str, ...]  # the cases of a run that asks for none
    quick: tuple[str, ...]  # and of a quick one: small, and of several sizes
    anchor: str
    make: Callable[[Case, torch.dtype, str], Work]


def _ms_deform_attn(case: Case, dtype: torch.dtype, device: str, locations: str = "near") -> Work:
    assert isinstance(case, MsDeformAttnCase)
    inputs = make_inputs(case, locations=locations, dtype=dtype, device=device)
    tables = inputs.spatial_shapes, inputs.level_start_index

    def formula(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        points = (case.points,) * len(case.levels)
        return _head_by_head(
            lambda value, locations, weights: reference.ms_deform_attn(
                value, *tables, locations.flatten(3, 4), weights.flatten(3), points
            ),
            value,
            locations,
            weights,
        )

    return Work(
        dict(zip(("value", "locations", "weights"), inputs.differentiable())),
        lambda value, *rest, backend: vitkern.ms_deform_attn(value, *tables, *rest, backend=backend),
        lambda *tensors: _by_grid_sample(list(case.levels), *tensors),
        formula,
        {"locations": inside_a_cell(inputs.sampling_locations, tables[0])},
    )


def _by_grid_sample(sizes: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
    """16 bits cannot address a pixel, so here as under autocast grid_sample works in float32."""
    dtype = tensors[0].dtype
    wide = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in tensors)
    return reference.ms_deform_attn_by_grid_sample(next(wide), sizes, *wide).to(dtype)


def _head_by_head(function: Function, *tensors: Tensor) -> Tensor:
    """Heads do not meet, and one at a time takes a fraction of the memory: [B, ., M, ...] each, [B, Q, M * D].

    On a card, of which memory is the scarce part, what one needs for its gradients is computed again.
    """
    heads = range(tensors[0].shape[2])
    one = functools.partial(checkpoint, function, use_reentrant=False) if tensors[0].is_cuda else function
    return torch.cat([one(*(tensor[:, :, head, None] for tensor in tensors)) for head in heads], -1)


def _ms_deform_attn_fused(case: Case, dtype: torch.dtype, device: str) -> Work:
    assert isinstance(case, MsDeformAttnCase)
    (value, points, offsets, logits), tables = near_fused_inputs(case, dtype, device)

    def formula(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        counts = (case.points,) * len(case.levels)
        return _head_by_head(
            lambda value, offsets, logits: reference.ms_deform_attn_fused(
                value, *tables, points.double(), offsets.flatten(3, 4), logits, counts
            ),
            value,
            offsets,
            logits,
        )

    def by_grid_sample(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        return _by_grid_sample(list(case.levels), value, locations_of(points, offsets, tables[0]), weights)

    return Work(
        {"value": value, "offsets": offsets, "logits": logits},
        lambda value, *rest, backend: vitkern.ms_deform_attn_fused(
            value, *tables, points, *rest, backend=backend
        ),
        by_grid_sample,
        formula,
        {"offsets": inside_a_cell(locations_of(points, offsets.double(), tables[0]), tables[0])},
    )


def near_fused_inputs(
    case: MsDeformAttnCase, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Reference points at the middle of each query's near locations, in float32 as networks have them; and levels."""
    inputs = make_inputs(case, dtype=torch.float64, device=device)
    middle = inputs.sampling_locations.mean((2, 4))  # [B, Q, L, 2]
    value, points, *rest = fused_inputs(inputs, middle, torch.Generator().manual_seed(0))
    tensors = (value.to(dtype), points.float(), *(tensor.to(dtype) for tensor in rest))
    return tensors, (inputs.spatial_shapes, inputs.level_start_index)


def _adapter_bottleneck(case: Case, dtype: torch.dtype, device: str) -> Work:
    assert isinstance(case, AdapterBottleneckCase)
    tensors = case.make(dtype=dtype, device=device)
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias")

    def plain(x: Tensor, *parameters: Tensor) -> Tensor:
        down_weight, down_bias, up_weight, up_bias = parameters
        return reference.adapter_bottleneck(x, down_weight, down_bias, up_weight, up_bias, x, 0.1)

    return Work(
        {name: tensors[name] for name in names},
        lambda *tensors, backend: vitkern.adapter_bottleneck(
            *tensors, residual=tensors[0], scale=0.1, backend=backend
        ),
        plain,
        plain,
        {},
    )


def _token_pool(case: Case, dtype: torch.dtype, device: str) -> Work:
    assert isinstance(case, TokenCase)
    x, weight = (tensor.to(dtype) for tensor in case.make_pool(device=device))
    inputs = {"x": x, "weight": weight}
    return Work(inputs, vitkern.token_pool, reference.token_pool, reference.token_pool, {})  # type: ignore[arg-type]


def _token_project(case: Case, dtype: torch.dtype, device: str) -> Work:
    assert isinstance(case, TokenCase)
    tensors = (tensor.to(dtype) for tensor in case.make_project(device=device))
    inputs = dict(zip(("x", "query", "key", "tokens"), tensors))
    return Work(inputs, vitkern.token_project, reference.token_project, reference.token_project, {})


_ATTENTION = ("hub-small", "detr-decoder", "detr-encoder", "m2f-512", "rtdetr-decoder", "lwdetr-decoder")
_ATTENTION_USUAL = (*_ATTENTION, "injector-B512", "extractor-B512")
_ATTENTION_QUICK = ("hub-small", "injector-T512", "injector-B512")
_TOKENS_QUICK = ("vt-resnet18", "vt-resnet50", "vt-3136")

OPS = {
    op.name: op
    for op in (
        Op("ms_deform_attn", ATTENTION_CASES, _ATTENTION_USUAL, _ATTENTION_QUICK, "gather", _ms_deform_attn),
        Op(
            "ms_deform_attn_fused",
            ATTENTION_CASES,
            _ATTENTION_USUAL,
            _ATTENTION_QUICK,
            "gather",
            _ms_deform_attn_fused,
        ),
        Op(
            "adapter_bottleneck",
            ADAPTER_CASES,
            tuple(ADAPTER_CASES),
            ("adaptformer-4", "one-image", "adaptformer-video"),
            "product",
            _adapter_bottleneck,
        ),
        Op("token_pool", TOKEN_CASES, tuple(TOKEN_CASES), _TOKENS_QUICK, "product", _token_pool),
        Op("token_project", TOKEN_CASES, tuple(TOKEN_CASES), _TOKENS_QUICK, "product", _token_project),
    )
}
