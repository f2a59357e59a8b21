# SPDX-License-Identifier: Apache-2.0
"""The layer of GroundingDINO, which is mmcv's without dropout and identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitkern.compat.mmcv import attend


def forward(
    layer: Any,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    level_start_index: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """The ``forward`` of its MultiScaleDeformableAttention."""
    return attend(
        layer,
        query,
        value,
        query_pos,
        key_padding_mask,
        reference_points,
        spatial_shapes,  # type: ignore[arg-type]
        level_start_index,
    )
