# SPDX-License-Identifier: Apache-2.0
"""The ops that multiply matrices, the adapter bottleneck and the token ops, as problems made from a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import reference
from vitkern.cases.dense import KEYS, AdapterBottleneckCase, TokenCase
from vitkern.cases.record import Problem

# An activation of x is x times this.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "gelu": lambda x: (1 + torch.special.erf(x / 2**0.5)) / 2,
    "silu": torch.sigmoid,
}
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")


def adapter_bottleneck(
    case: AdapterBottleneckCase,
    device: str,
    seed: int,
    without: Sequence[str] = (),
    residual: str = "",
    **options: Any,
) -> Problem:
    """The problem of a case. `without`: optional inputs that are absent; `residual="x"`: the residual is x itself."""
    inputs = case.make(dtype=torch.float64, device=device, seed=seed)
    for name in (*without, *(("residual",) if residual else ())):
        del inputs[name]
    names = tuple(inputs)

    def arguments(tensors: tuple[Tensor, ...]) -> tuple[list[Any], dict[str, Any]]:
        given = dict(zip(names, tensors))
        if residual:
            given["residual"] = given["x"]
        first = [given.pop("x"), *(given.pop(name, None) for name in PARAMETERS)]
        return first, {**given, **options}

    def call(*tensors: Tensor, backend: str | None, tables: tuple[Tensor, ...] | None = None) -> Tensor:
        if options.get("training"):
            torch.manual_seed(seed)  # the same dropout at each call
        first, others = arguments(tensors)
        return vitkern.adapter_bottleneck(*first, **others, backend=backend)

    def by_torch(*tensors: Tensor) -> Tensor:
        first, others = arguments(tensors)
        return reference.adapter_bottleneck(*first, **others)

    def other(*tensors: Tensor) -> Tensor:
        if options.get("training"):
            return call(*tensors, backend="reference")  # no other function draws the same mask
        (x, down_weight, down_bias, up_weight, up_bias), others = arguments(tensors)
        hidden = x @ down_weight.mT + (0 if down_bias is None else down_bias)
        hidden = hidden * GATES[options.get("activation", "relu")](hidden)
        output = hidden @ up_weight.mT + (0 if up_bias is None else up_bias)
        return others.get("residual", 0) + others.get("scale", 1.0) * output

    def terms(output: Tensor) -> Tensor:
        # In 400 seeds of a row of 40 channels plain torch is off by up to 1.2 roundings of this, the kernel by 2.1.
        return (output - inputs["residual"] if "residual" in inputs else output).abs().sum()

    return Problem(inputs, call, by_torch, other, sums={"gradient of scale": terms})


def token_pool(case: TokenCase, device: str, seed: int, recurrent: bool = False) -> Problem:
    inputs = dict(zip(("x", "weight"), case.make_pool(device=device, seed=seed, recurrent=recurrent)))
    return Problem(inputs, _call_of(vitkern.token_pool), reference.token_pool, _pool_by_attention)


def _pool_by_attention(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(weight.expand(len(x), -1, -1), x, x, scale=1.0)


def token_project(case: TokenCase, device: str, seed: int, keys: int = KEYS) -> Problem:
    tensors = case.make_project(keys=keys, device=device, seed=seed)
    inputs = dict(zip(("x", "query", "key", "tokens"), tensors))
    return Problem(inputs, _call_of(vitkern.token_project), reference.token_project, _project_by_attention)


def _project_by_attention(x: Tensor, query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    return x + torch.nn.functional.scaled_dot_product_attention(query, key, tokens, scale=1.0)


def _call_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(*tensors: Tensor, backend: str | None, tables: tuple[Tensor, ...] | None = None) -> Tensor:
        return function(*tensors, backend=backend)

    return call
