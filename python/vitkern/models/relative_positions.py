# SPDX-License-Identifier: Apache-2.0
"""Attention biases for the distance of two tokens, in tables that are resized for other windows as in BEiT.

The old distances are placed among the new ones in a geometric progression: the table keeps its values near the centre
and is stretched far away. A cubic spline interpolates between them along each axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLS_ROWS = 3  # class token to token, token to class token, class token to itself


def relative_position_index(height: int, width: int, with_cls: bool) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: [N, N], N = height * width (+ 1)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down = rows.reshape(-1, 1) - rows.reshape(1, -1) + height - 1
    right = columns.reshape(-1, 1) - columns.reshape(1, -1) + width - 1
    index = down * (2 * width - 1) + right
    if with_cls:  # three more rows: class token to token, token to class token, class token to itself
        distances = (2 * height - 1) * (2 * width - 1)
        index = F.pad(index, (1, 0, 1, 0), value=distances + 1)
        index[0, :] = distances
        index[:, 0] = distances + 1
        index[0, 0] = distances + 2
    return index


class RelativePositions(nn.Module):
    """A learnable bias for each head and each distance of two tokens of a window."""

    relative_position_index: Tensor

    def add_positions(self, window: tuple[int, int], num_heads: int, with_cls: bool) -> None:
        height, width = window
        rows = (2 * height - 1) * (2 * width - 1) + (3 if with_cls else 0)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(height, width, with_cls))

    def position_bias(self) -> Tensor:  # [M, N, N]
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


def resize_table(table: Tensor, rows: int) -> Tensor:
    """Resizes a table from [old rows, M] to [rows, M]. The class token's rows, if any, come last: kept or dropped."""
    old, old_cls = _side(table.shape[0])
    new, new_cls = _side(rows)
    if new_cls > old_cls:
        raise ValueError(
            f"a table of {table.shape[0]} relative positions has no rows for the class token, {rows} needs them"
        )
    distances, cls = table[: old * old], table[old * old : old * old + new_cls]
    if old != new:
        if old < 5:
            raise ValueError(
                f"a table of {table.shape[0]} relative positions is too small for a spline: a window of 3 x 3 "
                "is the smallest one that can be resized"
            )
        matrix = spline_matrix(_knots(old, new), torch.arange(new, dtype=torch.float64) - new // 2)
        maps = distances.double().T.unflatten(1, (old, old))  # [M, old, old]
        distances = (matrix @ maps @ matrix.T).flatten(1).T.to(table.dtype)
    return torch.cat([distances, cls])


def _side(rows: int) -> tuple[int, int]:
    """The side of the square of distances, and the number of rows after it."""
    for cls in (0, CLS_ROWS):
        side = math.isqrt(max(rows - cls, 0))
        if side and side * side == rows - cls:
            return side, cls
    raise ValueError(f"a table of {rows} relative positions fits no square window")


def _knots(old: int, new: int) -> Tensor:
    """The positions of the old distances among the new ones: 0, then steps of 1, q, q^2 ... to either side."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    steps = torch.tensor(q, dtype=torch.float64) ** torch.arange(old // 2)
    outwards = steps.cumsum(0)
    return torch.cat([-outwards.flip(0), outwards.new_zeros(1), outwards])


def spline_matrix(knots: Tensor, at: Tensor) -> Tensor:
    """The interpolation matrix from values at `knots` to their cubic spline at `at`: [len(at), len(knots)].

    The spline is "not-a-knot": its third derivative is continuous at the second and the second-last knot. Points
    outside the knots take the value at the nearest end.
    """
    count = len(knots)
    steps = knots.diff()
    slopes = torch.zeros(count - 1, count, dtype=knots.dtype)  # of the chords, as linear maps of the values
    for i in range(count - 1):
        slopes[i, i], slopes[i, i + 1] = -1 / steps[i], 1 / steps[i]

    # Second derivatives m: steps[i-1] m[i-1] + 2 (steps[i-1] + steps[i]) m[i] + steps[i] m[i+1] = 6 change of slope.
    system = torch.zeros(count, count, dtype=knots.dtype)
    right = torch.zeros(count, count, dtype=knots.dtype)
    for i in range(1, count - 1):
        system[i, i - 1], system[i, i], system[i, i + 1] = (
            steps[i - 1],
            2 * (steps[i - 1] + steps[i]),
            steps[i],
        )
        right[i] = 6 * (slopes[i] - slopes[i - 1])
    system[0, :3] = torch.stack([steps[1], -(steps[0] + steps[1]), steps[0]])
    system[-1, -3:] = torch.stack([steps[-1], -(steps[-2] + steps[-1]), steps[-2]])
    curvature = torch.linalg.solve(system, right)

    at = at.clamp(knots[0], knots[-1])
    piece = (torch.searchsorted(knots, at, right=True) - 1).clamp(0, count - 2)
    t, step = (at - knots[piece])[:, None], steps[piece][:, None]
    left, right_end = curvature[piece], curvature[piece + 1]
    slope = slopes[piece] - step * (2 * left + right_end) / 6
    values = torch.eye(count, dtype=knots.dtype)[piece]
    return values + t * (slope + t * (left / 2 + t * (right_end - left) / (6 * step)))
