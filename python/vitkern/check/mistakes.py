# SPDX-License-Identifier: Apache-2.0
"""The usual mistakes behind an output. Each is the formula at other locations."""

from __future__ import annotations

from torch import Tensor

from vitkern.cases import Function
from vitkern.check.compare import judge
from vitkern.check.examine import Expected

# From locations and the levels' (width, height) to the locations that are sampled by mistake.
MISTAKES: dict[str, Function] = {
    "x and y exchanged": lambda places, sizes: places.flip(-1),
    "align_corners=True": lambda places, sizes: (places * (sizes - 1) + 0.5) / sizes,
    "padding_mode='border'": lambda places, sizes: places.clamp(0.5 / sizes, 1 - 0.5 / sizes),
}


def mistake_in(output: Tensor, known: Expected, spatial_shapes: Tensor, times: float) -> str | None:
    """The mistake that explains the output of a wrong ms_deform_attn, if it is one of the above."""
    wide = [tensor.double() for tensor in known.tensors]
    for name, moved in MISTAKES.items():
        plain, exact = (
            known.problem.formula(value, moved(places, spatial_shapes.flip(1)[:, None]), weights)
            for value, places, weights in (known.tensors, wide)
        )
        if judge(output, plain, exact, times=times).complaint is None:
            return name
    return None
