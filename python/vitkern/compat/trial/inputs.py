# SPDX-License-Identifier: Apache-2.0
"""The inputs of a trial, by the roles of a forward's arguments.

Sampling points must keep away from the edges of cells, where the gradient of a location jumps: both sides would round
to different cells. So reference points lie in the middle between four pixels, inside, at the border and outside, and
offsets are whole pixels, plus or minus a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkern.compat.trial.settings import LEVELS, Setting
from vitkern.compat.trial.specimen import Child, Draws, UnfitError


class Sizes(NamedTuple):
    """The sizes of a layer, or of a core."""

    heads: int
    points: tuple[int, ...]  # of each level
    query: int  # channels
    value: int  # channels
    reach: float  # how far an offset of one moves a point of a box of size one, as a share of the level
    scaled: bool  # whether a buffer scales offsets further, by a half or one

    @property
    def levels(self) -> int:
        return len(self.points)


def level_sizes(setting: Setting, levels: int) -> list[tuple[int, int]]:
    listed = LEVELS[setting.levels]
    sizes = [listed[index % len(listed)] for index in range(levels)]
    height, width = sizes[0]
    if height * width < setting.least:
        sizes[0] = (2, setting.least)
    return sizes


def aim(child: Child, sizes: Sizes, draws: Draws) -> None:
    """Sets weights for offsets that are nearly whole numbers."""
    parts, outputs = child._master["weight"].shape
    child._master["weight"] = draws.uniform(parts, outputs, low=0.02, high=0.05) / parts
    whole = draws.integers(outputs, low=-1, high=2).float() * (2 if sizes.scaled else 1)
    child._master["bias"] = whole + draws.uniform(outputs, low=0.004, high=0.008)


def reference_points(setting: Setting, queries: int, sizes: Sizes, draws: Draws) -> Tensor:
    """Reference points [B, Q, L | 1, 2 | 4], each between four pixels, also before the first and behind the last."""
    extent = torch.tensor(level_sizes(setting, sizes.levels), device="cpu").flip(-1)  # (width, height)
    largest = extent
    if (
        setting.one_point
    ):  # that lies between pixels of all levels: a whole number of the pixels that all have
        largest = extent.amax(0, keepdim=True)
        extent = torch.tensor([[math.gcd(*column) for column in extent.T.tolist()]], device="cpu")
    shape = (setting.batch, queries, len(extent), 2)
    between = (draws.uniform(*shape, low=0.0, high=1.0) * (extent + 5)).floor() - 2  # from outside to outside
    middle = (between + draws.uniform(*shape, low=-0.04, high=0.04) * extent / largest) / extent
    if not setting.boxes:
        return middle
    one_pixel = 1 / (extent * sizes.reach)
    small = draws.uniform(*shape, low=0.0, high=0.15) / (largest * sizes.reach)
    whole = (draws.uniform(*shape) > 0) & (one_pixel <= 2)
    return torch.cat([middle, torch.where(whole, one_pixel, small.clamp(0.01, 2.0))], -1)


def layer_inputs(
    setting: Setting,
    sizes: Sizes,
    roles: Mapping[str, str],
    draws: Draws,
    *,
    batch_first: bool,
    of_query: bool,
) -> dict[str, Any]:
    """Arguments by name. `of_query`: value is left out, and taken from the query."""
    levels = level_sizes(setting, sizes.levels)
    pixels = sum(height * width for height, width in levels)
    queries = pixels if of_query else setting.queries
    batch = setting.batch
    shapes = torch.tensor(levels, dtype=torch.int64, device="cpu")
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    mask = draws.uniform(batch, pixels) > 0.6
    mask[:, starts] = True  # at least one per level

    def sequence(length: int, channels: int) -> Tensor:
        drawn = draws.uniform(batch, length, channels, low=-0.5, high=0.5)
        return drawn if batch_first else drawn.transpose(0, 1).contiguous()

    found: dict[str, Any] = {}
    for name, role in roles.items():
        if role in ("query", "position", "identity"):
            value: Any = sequence(queries, sizes.query)
        elif role == "value":
            value = _marked(sequence(pixels, sizes.value) * setting.magnitude, setting, draws)
        elif role == "points":
            value = reference_points(setting, queries, sizes, draws)
        elif role == "shapes":
            value = shapes.clone()
        elif role in ("shapes_list", "pairs"):
            value = list(levels)
        elif role == "starts":
            value = starts.clone()
        elif role == "mask":
            value = mask
        elif role == "ignored":
            value = object()  # any use of it fails
        else:
            raise UnfitError(f"no input is known for the role {role!r}")
        left_out = (
            (role in ("position", "identity", "pairs", "ignored") and not setting.optional)
            or (role == "mask" and not setting.masked)
            or (role == "value" and of_query)
        )
        if not left_out:
            found[name] = value
    return found


def _marked(value: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """The value with NaN at some places, if the setting has them."""
    if setting.poisoned:
        value = torch.where(draws.uniform(*value.shape) > 0.9, torch.nan, value)
    return value


def core_inputs(
    setting: Setting, sizes: Sizes, roles: Mapping[str, str], draws: Draws, *, left_out: frozenset[str]
) -> dict[str, Any]:
    """Arguments of a core: value, levels, locations and weights; `left_out`: the roles of those that are not given."""
    points = sizes.points[:1] if setting.levels == "single" else sizes.points
    levels = level_sizes(setting, len(points))
    shapes = torch.tensor(levels, dtype=torch.int64, device="cpu")
    batch, heads = setting.batch, sizes.heads
    extent = shapes.flip(-1).float().repeat_interleave(torch.tensor(points, device="cpu"), 0)
    shape = (batch, setting.queries, heads, sum(points))
    between = (draws.uniform(*shape, 2, low=0.0, high=1.0) * (extent + 5)).floor() - 2
    locations = (between + draws.uniform(*shape, 2, low=-0.4, high=0.4)) / extent
    weights = draws.uniform(*shape, low=0.05, high=1.0)
    if "points_list" not in roles.values():  # else levels and points are on one axis
        locations = locations if setting.boxes else locations.unflatten(3, (len(points), -1))
        weights = weights if setting.boxes or setting.one_point else weights.unflatten(3, (len(points), -1))
    value = draws.uniform(batch, int(shapes.prod(1).sum()), heads, sizes.value) * setting.magnitude
    given = {
        "value": _marked(value, setting, draws),
        "points_list": list(points),
        "shapes": list(levels) if setting.masked else shapes,
        "shapes_list": list(levels),
        "starts": torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
        "locations": locations,
        "weights": weights,
        "step": 64,
    }
    return {name: given[role] for name, role in roles.items() if role not in left_out}
