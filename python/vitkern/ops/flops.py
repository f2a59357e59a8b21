# SPDX-License-Identifier: Apache-2.0
"""Operations of each op for torch's FlopCounterMode: two for each multiplication and its addition.

Operations are counted as for torch's own ops: products and sums of products, no softmax, no coordinates. A backward
pass counts twice its forward pass. The module is imported for its effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vitkern import functional as functional  # registers the ops
from vitkern.ops.op import REGISTERED, Op


def _register(op: Op[Any]) -> None:
    @register_flop_formula(getattr(torch.ops.vitkern, op.name))
    def forward(*shapes: Any, **_: Any) -> int:
        return op.flops(*shapes)

    @register_flop_formula(getattr(torch.ops.vitkern, f"{op.name}_backward"))
    def backward(grad_output: Any, needed: Any, *shapes: Any, **_: Any) -> int:
        return 2 * op.flops(*shapes)


for _op in REGISTERED:
    _register(_op)
