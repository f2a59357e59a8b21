# SPDX-License-Identifier: Apache-2.0
"""Seven wrong forms of the op: a trial whose inputs cannot tell them from the right one proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern import reference

Shapes = Any  # of levels: a tensor, or pairs
Counts = tuple[int, ...]


def _sampled(
    value: Tensor,  # [B, S, M, D]
    sizes: list[tuple[int, int]],
    locations: Tensor,  # [B, Q, M, K, 2]
    weights: Tensor,  # [B, Q, M, K]
    counts: Counts,
    **options: Any,  # of grid_sample
) -> Tensor:
    batch, _, heads, channels = value.shape
    samples = []
    pixels = value.split([height * width for height, width in sizes], 1)
    for image, (height, width), where in zip(pixels, sizes, locations.split(list(counts), 3)):
        grid = (2 * where - 1).transpose(1, 2).flatten(0, 1)
        image = image.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples.append(F.grid_sample(image, grid, **{"align_corners": False, **options}))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # [B * M, 1, Q, K]
    output = (torch.cat(samples, -1) * weights).sum(-1)  # [B * M, D, Q]
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def _softmax_a_level(weights: Tensor, counts: Counts) -> Tensor:
    parts = weights.split(list(counts), -1)
    return torch.cat([part / part.sum(-1, keepdim=True).clamp(min=1e-12) for part in parts], -1)


def _wrong(name: str, value: Tensor, sizes: Any, where: Tensor, weights: Tensor, counts: Counts) -> Tensor:
    options: dict[str, Any] = {}
    if name == "scaled":
        weights = weights * 1.001
    elif name == "x and y exchanged":
        where = where.flip(-1)
    elif name == "weights normalised a level":
        weights = _softmax_a_level(weights, counts)
    elif name == "align_corners":
        options = {"align_corners": True}
    elif name == "border padding":
        options = {"padding_mode": "border"}
    elif name == "nearest":
        options = {"mode": "nearest"}
    else:
        value = value.roll(1, 2)  # heads in another order
    return _sampled(value, sizes, where, weights, counts, **options)


NAMES = (
    "scaled",
    "x and y exchanged",
    "weights normalised a level",
    "align_corners",
    "border padding",
    "nearest",
    "heads in another order",
)


def _sizes_of(shapes: Shapes) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in shapes]


def twisted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement that calls a wrong kernel in place of this package's."""

    def plain(
        value: Tensor, shapes: Shapes, starts: Any, where: Tensor, weights: Tensor, **options: Any
    ) -> Tensor:
        counts = options.get("points_per_level")
        if counts is None:
            counts = (where.shape[4],) * where.shape[3]
            where, weights = where.flatten(3, 4), weights.flatten(3, 4)
        return _wrong(name, value, _sizes_of(shapes), where, weights, tuple(counts))

    def fused(
        value: Tensor, shapes: Shapes, starts: Any, points: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        counts = (offsets.shape[4],) * offsets.shape[3]
        sizes = torch.tensor(_sizes_of(shapes))
        where = reference.sampling_locations_of(sizes, points, offsets.flatten(3, 4), counts)
        return _wrong(name, value, _sizes_of(shapes), where, logits.softmax(-1), counts)

    kernels = {"ms_deform_attn": plain, "ms_deform_attn_fused": fused}
    return _with_globals(forward, kernels)


def _with_globals(function: Any, others: dict[str, Any]) -> Any:
    """A copy of one of our own forwards, and of the helpers that it calls, with other kernels."""
    if hasattr(function, "func"):  # a partial
        return type(function)(_with_globals(function.func, others), *function.args, **function.keywords)
    scope = dict(function.__globals__)

    def copied(each: FunctionType) -> FunctionType:
        made = FunctionType(each.__code__, scope, each.__name__, each.__defaults__, each.__closure__)
        made.__kwdefaults__ = each.__kwdefaults__
        return made

    for name, value in function.__globals__.items():
        if isinstance(value, FunctionType) and value.__module__ == function.__module__:
            scope[name] = copied(value)
    scope.update(others)
    return copied(function)
