# SPDX-License-Identifier: Apache-2.0
"""The places of sampling points in pixels, and the pixels that they touch: eqs. (2) to (4), (9) and (10).

Plain locations are converted to pixels by two roundings that the derivation fixes, so each lies in one cell. In the
fused form the order of the operations is free: near an edge, a point has an error and may lie in other cells too.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from tools.fuzzing.arithmetic import Arithmetic, Array, Bounded, exact

Pair = tuple[Bounded, Bounded]  # along x and y


@dataclass(frozen=True)
class Level:
    height: int
    width: int
    start: int
    points: slice  # of the K

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclass(frozen=True)
class Touched:
    """The pixels that points touch, [..., C] with C = 4, or 1 for `nearest`."""

    pixel: Array  # -1: none
    share: Bounded
    slope: Pair  # the share's derivatives along u and v


def plain_places(locations: Array, level: Level, acc: Arithmetic, method: str) -> Pair:
    """Pixel coordinates of locations [..., 2]: product, then shift, each rounded."""
    number = np.float64 if acc.name == "float64" else np.float32
    shift = number(-0.5 if method == "bilinear" else 0.5)
    u, v = (locations[..., i].astype(number) * number(level.size[i]) + shift for i in (0, 1))
    return exact(u), exact(v)


def fused_places(
    reference: Array, offsets: Array, level: Level, acc: Arithmetic, method: str
) -> tuple[Pair, tuple[Array, Array]]:
    """Pixel coordinates, NaN if not finite, of reference points [B, Q, 1, 1, 2 or 4] and offsets [B, Q, M, P, 2].

    Also returns the steps: the pixels that an offset of 1 stands for.
    """
    shift = -0.5 if method == "bilinear" else 0.5
    count = level.points.stop - level.points.start
    places, steps = [], []
    for axis, size in enumerate(level.size):
        start, moved = reference[..., axis], offsets[..., axis]
        boxes = reference.shape[-1] == 4
        step = reference[..., 2 + axis] * size / (2 * max(count, 1)) if boxes else np.ones_like(start)
        step = np.broadcast_to(step, moved.shape)
        place = start * size + moved * step + shift
        error = acc.unit * (4 * np.abs(start * size) + 8 * np.abs(moved * step) + 1) + acc.smallest
        if not boxes and size & (size - 1) == 0:
            error = np.where(_is_exact(start, moved, size, shift, acc), 0.0, error)
        nowhere = ~(np.isfinite(place) & np.isfinite(step) & np.isfinite(moved))
        places.append(Bounded(np.where(nowhere, np.nan, place), np.where(nowhere, 0.0, error)))
        steps.append(step)
    return (places[0], places[1]), (steps[0], steps[1])


def _is_exact(start: Array, moved: Array, size: int, shift: float, acc: Arithmetic) -> Array:
    """Whether a place is computed without rounding, in any order of operations; size is a power of two."""
    number = np.float64 if acc.name == "float64" else np.float32
    steps = (start * size, start * size + shift, start * size + moved, start * size + moved + shift)
    same = np.ones(np.broadcast(start, moved).shape, dtype=bool)
    for step in steps:
        same = same & (step.astype(number) == step) & (np.abs(step) < 2**20)
    # Multiples of this, below 2**20, have sums that float64 holds.
    fine = 2.0**-30
    return same & (np.mod(moved, fine) == 0) & (np.mod(start * size, fine) == 0)


def others_near(place: Pair) -> list[tuple[Array, Array]]:
    """Other places that rounding may give to the points, if they lie in other cells."""
    sides: list[list[Array]] = []
    for u in place:
        ways = [u.value]
        for side in (u.value - 2 * u.error, u.value + 2 * u.error):
            # A whole number is the edge of two cells, and at -1 it is outside.
            other = (np.floor(side) != np.floor(u.value)) | (np.ceil(side) != np.ceil(u.value))
            other &= ~np.isnan(u.value)
            if other.any():
                ways.append(np.where(other, side, u.value))
        sides.append(ways)
    along, down = sides
    return list(itertools.product(along, down))[1:]


def touched(place: Pair, level: Level, acc: Arithmetic, method: str) -> Touched:
    if method == "bilinear":
        return _bilinear(place, level, acc)
    (x, y), there = (p.value for p in place), level.width > 0 and level.height > 0
    finite = np.isfinite(x) & np.isfinite(y) & there
    column = np.clip(np.floor(np.where(finite, x, 0.0)), 0, max(level.width - 1, 0))
    row = np.clip(np.floor(np.where(finite, y, 0.0)), 0, max(level.height - 1, 0))
    pixel = np.where(finite, level.start + row * level.width + column, -1).astype(np.int64)
    none = exact(np.zeros((*x.shape, 1)))
    return Touched(pixel[..., None], exact(np.ones((*x.shape, 1))), (none, none))


def _bilinear(place: Pair, level: Level, acc: Arithmetic) -> Touched:
    (u, v), (width, height) = place, level.size
    near = (u.value > -1) & (u.value < width) & (v.value > -1) & (v.value < height)
    left, top = (np.where(near, np.floor(p.value), 0.0) for p in place)
    across = Bounded(np.where(near, u.value - left, 0.0), np.where(near, u.error + acc.unit, 0.0))
    down = Bounded(np.where(near, v.value - top, 0.0), np.where(near, v.error + acc.unit, 0.0))
    # On a whole number the share of the next pixel is 0, and that of this one 1, exactly.
    across, down = (
        Bounded(p.value, np.where((p.value == 0) & (q.error == 0), 0.0, p.error))
        for p, q in ((across, u), (down, v))
    )
    shares = [[Bounded(1 - p.value, p.error), p] for p in (across, down)]
    pixel, share, slope_x, slope_y = [], [], [], []
    for i, j in itertools.product((0, 1), (0, 1)):
        row, column = top + i, left + j
        inside = near & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel.append(np.where(inside, level.start + row * width + column, -1).astype(np.int64))
        of_row, of_column = shares[1][i], shares[0][j]
        share.append(acc.mul(of_row, of_column))
        slope_x.append(Bounded(of_row.value * (2 * j - 1), of_row.error))
        slope_y.append(Bounded(of_column.value * (2 * i - 1), of_column.error))
    return Touched(np.stack(pixel, -1), _stacked(share), (_stacked(slope_x), _stacked(slope_y)))


def _stacked(parts: list[Bounded]) -> Bounded:
    return Bounded(*(np.stack(each, -1) for each in zip(*parts)))
