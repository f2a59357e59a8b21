# SPDX-License-Identifier: Apache-2.0
"""Operations of each op for torch's FlopCounterMode: two for each multiplication and its addition.

Operations are counted as for torch's own ops: products and sums of products, no softmax, no coordinates. A backward
pass counts twice its forward pass. The module is imported for its effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

CORNERS = 4  # pixels that a bilinear sample blends


def _samples(value: Any, locations: Any) -> int:
    """Operations on [B, S, M, D] and [B, Q, M, ..., 2]: each point blends its corners, D channels each."""
    return 2 * CORNERS * value[-1] * math.prod(locations[:-1])


# Functions of the shapes of an op's tensors, in order.
_FORMULAS: dict[str, Callable[..., int]] = {
    "ms_deform_attn": lambda value, shapes, starts, locations, *_: _samples(value, locations),
    "ms_deform_attn_fused": lambda value, shapes, starts, points, offsets, *_: _samples(value, offsets),
    # [..., C], [H, C]: down and up
    "adapter_bottleneck": lambda x, down_weight, *_: 4 * math.prod(x) * down_weight[0],
    # [B, N, C], [T, C] | [B, T, C]: scores, then sums
    "token_pool": lambda x, weight, *_: 4 * math.prod(x) * weight[-2],
    # [B, N, K], [B, T, C]: scores, then sums
    "token_project": lambda x, query, key, tokens, *_: (
        2 * math.prod(query[:2]) * tokens[1] * (query[2] + tokens[2])
    ),
}


def _register(name: str, formula: Callable[..., int]) -> None:
    @register_flop_formula(getattr(torch.ops.vitkern, name))
    def forward(*shapes: Any, **_: Any) -> int:
        return formula(*shapes)

    @register_flop_formula(getattr(torch.ops.vitkern, f"{name}_backward"))
    def backward(grad_output: Any, needed: Any, *shapes: Any, **_: Any) -> int:
        return 2 * formula(*shapes)


for _name, _formula in _FORMULAS.items():
    _register(_name, _formula)
