# SPDX-License-Identifier: Apache-2.0
"""Operations of each op for torch's FlopCounterMode: two for each multiplication and its addition.

As torch counts its own ops: products and sums of products, no softmax, no coordinates. A backward pass counts twice its
forward pass. Imported for its effect.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

CORNERS = 4  # pixels that a bilinear sample blends


def _samples(value: Any, locations: Any) -> int:
    """[B, S, M, D] and [B, Q, M, ..., 2]: each point blends its corners, D channels of them."""
    return 2 * CORNERS * value[-1] * math.prod(locations[:-1])


def _bottleneck(x: Any, down_weight: Any) -> int:  # [..., C], [H, C]: down and up
    return 4 * math.prod(x) * down_weight[0]


def _pool(x: Any, weight: Any) -> int:  # [B, N, C], [T, C] | [B, T, C]: scores, then sums
    return 4 * math.prod(x) * weight[-2]


def _project(query: Any, tokens: Any) -> int:  # [B, N, K], [B, T, C]: scores, then sums
    return 2 * math.prod(query[:2]) * tokens[1] * (query[2] + tokens[2])


_OPS = torch.ops.vitkern


@register_flop_formula(_OPS.ms_deform_attn)
def _ms_deform_attn(value: Any, shapes: Any, starts: Any, locations: Any, *_: Any, **__: Any) -> int:
    return _samples(value, locations)


@register_flop_formula(_OPS.ms_deform_attn_backward)
def _ms_deform_attn_backward(
    grad: Any, needed: Any, value: Any, shapes: Any, starts: Any, locations: Any, *_: Any, **__: Any
) -> int:
    return 2 * _samples(value, locations)


@register_flop_formula(_OPS.ms_deform_attn_fused)
def _ms_deform_attn_fused(
    value: Any, shapes: Any, starts: Any, reference: Any, offsets: Any, *_: Any, **__: Any
) -> int:
    return _samples(value, offsets)


@register_flop_formula(_OPS.ms_deform_attn_fused_backward)
def _ms_deform_attn_fused_backward(
    grad: Any,
    needed: Any,
    value: Any,
    shapes: Any,
    starts: Any,
    reference: Any,
    offsets: Any,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _samples(value, offsets)


@register_flop_formula(_OPS.adapter_bottleneck)
def _adapter_bottleneck(x: Any, down_weight: Any, *_: Any, **__: Any) -> int:
    return _bottleneck(x, down_weight)


@register_flop_formula(_OPS.adapter_bottleneck_backward)
def _adapter_bottleneck_backward(grad: Any, needed: Any, x: Any, down_weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _bottleneck(x, down_weight)


@register_flop_formula(_OPS.token_pool)
def _token_pool(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _pool(x, weight)


@register_flop_formula(_OPS.token_pool_backward)
def _token_pool_backward(grad: Any, needed: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _pool(x, weight)


@register_flop_formula(_OPS.token_project)
def _token_project(x: Any, query: Any, key: Any, tokens: Any, *_: Any, **__: Any) -> int:
    return _project(query, tokens)


@register_flop_formula(_OPS.token_project_backward)
def _token_project_backward(
    grad: Any, needed: Any, x: Any, query: Any, key: Any, tokens: Any, *_: Any, **__: Any
) -> int:
    return 2 * _project(query, tokens)
