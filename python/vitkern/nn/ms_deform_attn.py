# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn of Deformable-DETR and ViT-Adapter: same constructor, parameters and results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkern.functional import ms_deform_attn_fused
from vitkern.reference import sampling_locations_of


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections. Loads checkpoints of Deformable-DETR and ViT-Adapter.

    Args:
        d_model: channels of queries, input and output, C.
        n_levels, n_heads, n_points: L levels, M heads, P points of each level.
        ratio: channels of the projected value over d_model (ViT-Adapter's ``deform_ratio``).
        im2col_step: accepted for compatibility, without effect: any batch size runs.
        backend: passed on to :func:`vitkern.ms_deform_attn`.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        ratio: float = 1.0,
        *,
        im2col_step: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if min(n_levels, n_heads, n_points) < 1:
            raise ValueError(
                f"MSDeformAttn: n_levels, n_heads and n_points must be at least 1, got {n_levels}, {n_heads} and "
                f"{n_points}"
            )
        if d_model % n_heads:
            raise ValueError(
                f"MSDeformAttn: d_model must be divisible by n_heads, got {d_model} and {n_heads}"
            )
        d_value = int(d_model * ratio)
        if d_value % n_heads:
            raise ValueError(
                f"MSDeformAttn: int(d_model * ratio) = {d_value} must be divisible by n_heads={n_heads}"
            )
        self.im2col_step = im2col_step
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.ratio = ratio
        self.backend = backend

        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_value)
        self.output_proj = nn.Linear(d_value, d_model)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Initial offsets: each head has its own direction on a square, point p at distance p + 1; equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True)[0]
        distances = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = directions[:, None, None] * distances[:, None]  # [M, 1, P, 2]
        bias = bias.expand(-1, self.n_levels, -1, -1).reshape(-1)
        self.sampling_offsets.bias.copy_(bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,  # [B, Q, C]
        reference_points: Tensor,  # [B | 1, Q, L | 1, 2] as (x, y), or 4 as (x, y, width, height), in [0, 1]
        input_flatten: Tensor,  # [B, S, C]
        input_spatial_shapes: Tensor | Sequence[tuple[int, int]],  # [L, 2] as (height, width)
        input_level_start_index: Tensor | Sequence[int] | None = None,  # [L]
        input_padding_mask: Tensor | None = None,  # [B, S], True where the input is padding
    ) -> Tensor:  # [B, Q, C]
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))

        output = ms_deform_attn_fused(
            value,
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            *self._offsets_and_logits(query),
            backend=self.backend,
        )
        return self.output_proj(output)

    def _offsets_and_logits(self, query: Tensor) -> tuple[Tensor, Tensor]:
        batch, queries, _ = query.shape
        heads, levels, points = self.n_heads, self.n_levels, self.n_points
        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
        return offsets, self.attention_weights(query).view(batch, queries, heads, levels * points)

    def sampling_points(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | Sequence[tuple[int, int]],
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sampling locations and attention weights of :meth:`forward`, for pictures.

        Returns:
            Locations ``[B, Q, M, L, P, 2]`` as (x, y), 0 to 1 across a level, and weights ``[B, Q, M, L, P]``.
        """
        offsets, logits = self._offsets_and_logits(query)
        shapes = torch.as_tensor(input_spatial_shapes, device=query.device)
        locations = sampling_locations_of(
            shapes, reference_points, offsets.flatten(3, 4), (self.n_points,) * self.n_levels
        )
        return locations.view(offsets.shape), logits.softmax(-1).view(offsets.shape[:-1])

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"n_points={self.n_points}, ratio={self.ratio}"
        )
