# SPDX-License-Identifier: Apache-2.0
"""The conditions that a trial runs under: a table in which every pair of them occurs."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The sizes of the levels, as (height, width), by name. A layer with more levels than are listed repeats them.
LEVELS = {
    "uneven": ((4, 6), (2, 3), (6, 3)),
    "pixel": ((3, 5), (1, 1), (4, 2)),
    "wide": ((2, 6), (1, 4), (3, 2)),
    "large": ((5, 7), (2, 3), (3, 4)),
    "single": ((4, 6),),  # for cores, which take any number of levels
}


class Setting(NamedTuple):
    """One run of a trial. The first eight fields are combined; the others are for code that decides by them."""

    batch: int = 3
    levels: str = "uneven"
    boxes: bool = False  # reference points with (width, height)
    one_point: bool = False  # one reference point for all levels
    masked: bool = True
    optional: bool = True  # whether the arguments that may be left out are given
    training: bool = False
    autocast: bool = False  # bfloat16
    steep: bool = False  # logits up to 20, under autocast to 4
    queries: int = 10
    magnitude: float = 1.0  # of value
    poisoned: bool = False  # whether some elements of value are NaN
    least: int = 0  # the least number of pixels in the first level
    dtype: torch.dtype = torch.float32
    gradients: bool = True
    card: bool = False  # torch reports a card
    on_card: bool = False  # tensors report that they are on it
    compiled_core: bool = True  # a compiled module that is missing is taken as published
    traced: bool = False  # torch reports that it is compiling

    @property
    def exact(self) -> bool:
        """Whether two right results agree to float32."""
        return not self.autocast and self.dtype in (torch.float32, torch.float64)

    @property
    def rounding(self) -> float:
        """The step between two neighbouring numbers in the dtype of the calculation."""
        return torch.finfo(torch.bfloat16 if self.autocast else self.dtype).eps

    def in_float64(self) -> Setting:
        return self._replace(autocast=False, dtype=torch.float64, card=False, on_card=False, traced=False)

    def __str__(self) -> str:
        parts = [
            f"batch {self.batch}",
            "boxes" if self.boxes else "points",
            f"levels {self.levels}",
            "a mask" if self.masked else "no mask",
            "training" if self.training else "evaluation",
        ]
        parts += ["bfloat16 autocast"] * self.autocast + ["large logits"] * self.steep
        parts += ["tensors on a card"] * self.on_card + ["while compiling"] * self.traced
        parts += [f"values up to {self.magnitude:g}"] * (self.magnitude != 1) + ["NaN values"] * self.poisoned
        parts += [f"{self.queries} queries"] * (self.queries > 10)
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32)
        return ", ".join(parts)


def _table() -> tuple[Setting, ...]:
    columns = ("batch", "levels", "boxes", "one_point", "masked", "optional", "training", "autocast", "steep")
    rows = (
        (3, "pixel", 1, 0, 1, 0, 0, 0, 1),
        (1, "uneven", 0, 0, 1, 0, 1, 0, 0),
        (3, "pixel", 0, 1, 0, 1, 1, 0, 1),
        (3, "wide", 1, 1, 1, 1, 0, 0, 0),
        (1, "wide", 0, 0, 0, 0, 0, 1, 0),
        (3, "uneven", 1, 1, 0, 1, 0, 1, 1),
        (1, "wide", 1, 0, 1, 1, 1, 1, 1),
        (1, "pixel", 1, 1, 0, 0, 1, 1, 0),
    )
    made = [dict(zip(columns, (row[0], row[1], *map(bool, row[2:])))) for row in rows]
    # More queries and pixels than any number that the code names.
    made += [
        {"batch": 2, "levels": "large", "boxes": False},
        {"batch": 1, "levels": "large", "boxes": True, "one_point": True, "masked": False},
        # Values that a clamp or a test for overflow would change.
        {"batch": 2, "magnitude": 1e7, "boxes": True},
        {"batch": 1, "poisoned": True, "gradients": False, "masked": False},
        {"batch": 1, "poisoned": True, "gradients": False, "masked": False, "boxes": True, "one_point": True},
    ]
    return tuple(Setting(**each) for each in made)  # type: ignore[arg-type]


BASIC = _table()


def fitted(setting: Setting, points: int, above: int) -> Setting:
    """The setting with enough queries for a layer's points; in the large setting, with more of each than `above`."""
    if setting.levels == "large":
        return setting._replace(queries=max(32, above + 1), least=above + 1)
    return setting._replace(queries=min(10, max(4, -(-640 // points))))


# Settings that are tried in turn until every way through the code has been taken.
FURTHER = (
    {"card": True},
    {"card": True, "on_card": True},
    {"card": True, "on_card": True, "dtype": torch.float16},
    {"gradients": False},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
    {"compiled_core": False},
    {"traced": True},
)

# The same for cores, in which other settings mean nothing.
OF_CORES = (
    {"levels": "single"},
    {"card": True, "boxes": True, "one_point": True},
    {"card": True, "boxes": False, "one_point": True},
)
