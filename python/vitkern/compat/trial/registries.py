# SPDX-License-Identifier: Apache-2.0
"""The kernels that projects look up at run time. In a trial they find the published op, or none.

LibreYOLO's functions ask its registry. NVIDIA TAO's layers call ``torch.ops.nvidia``, which a library of its own fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vitkern import reference

Kernel = Callable[..., Any]

LIBREYOLO = "libreyolo.kernels.attention.ms_deform_attn"


def of_libreyolo(*, filled: bool, takes: bool) -> dict[str, Kernel]:
    """The functions of LibreYOLO that ask its registry, by name.

    `filled`: whether a kernel is registered; `takes`: whether it takes the call.
    """

    def available(*_: Any) -> bool:
        return filled

    def attend(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor | None:
        return _sampled(value, shapes, locations, weights) if filled and takes else None

    def attend_v2(
        value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, counts: Any
    ) -> Tensor | None:
        return _sampled(value, shapes, locations, weights, tuple(counts)) if filled and takes else None

    return {
        "ms_deform_attn_available": available,
        "maybe_ms_deform_attn": attend,
        "maybe_ms_deform_attn_v2": attend_v2,
    }


def _sampled(
    value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, counts: tuple[int, ...] = ()
) -> Tensor:
    """The op in plain torch, with gradients."""
    if not counts:
        counts = (locations.shape[4],) * locations.shape[3]
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    sizes = torch.tensor([[int(height), int(width)] for height, width in shapes])
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    return reference.ms_deform_attn(value, sizes, starts, locations, weights, counts)


def of_tao(forward: Kernel, backward: Kernel) -> Mapping[str, Kernel]:
    """The ops of NVIDIA TAO, by their names below ``torch``. The first returns [B, Q, M, D]."""

    def plugin(value: Tensor, *others: Any) -> Tensor:
        output: Tensor = forward(value, *others)
        return output.unflatten(-1, value.shape[2:])

    def dmha_backward(*given: Any) -> Any:
        *inputs, gradient, step = given
        return backward(*inputs, gradient.flatten(2), step)

    return {
        "ops.nvidia.MultiscaleDeformableAttnPlugin_TRT": plugin,
        "ops.nvidia.DMHA_backward": dmha_backward,
    }
