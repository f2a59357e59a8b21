# SPDX-License-Identifier: Apache-2.0
"""Whether two sets of times differ: medians of ratios, a bootstrap interval, and a verdict.

Times on a shared machine have a long tail of slow samples and drift with the hour. So what is compared are ratios of
samples that were taken next to each other, by their median, and the interval comes from drawing the samples again, not
from an assumption about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
# With a few dozen rows in a run, one in twenty would be a false alarm too many.
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Factor:
    """By which B takes longer than A, and what it may as well be."""

    middle: float
    low: float
    high: float

    def verdict(self, smallest: float) -> str:
        """ "slower" and "faster" need an interval without 1 and an effect that is worth a name."""
        if self.low > 1 and self.middle >= 1 + smallest:
            return "slower"
        if self.high < 1 and self.middle <= 1 / (1 + smallest):
            return "faster"
        return "no difference"


def factor_by_anchor(
    a: Sequence[float], anchor_of_a: Sequence[float], b: Sequence[float], anchor_of_b: Sequence[float]
) -> Factor:
    """Of two runs, each sample by that of the anchor in its round."""
    generator = torch.Generator().manual_seed(0)
    in_a, in_b = _logs(a, anchor_of_a), _logs(b, anchor_of_b)
    drawn = [ratios[_draw(len(ratios), len(ratios), generator)].median(1).values for ratios in (in_a, in_b)]
    return _factor(in_b.median() - in_a.median(), drawn[1] - drawn[0])


def factor_of_pairs(launches: Sequence[Sequence[tuple[float, float]]]) -> Factor:
    """Of times (of A, of B) taken in turn, in several launches of both.

    Launches differ by more than rounds do: memory lies elsewhere. So launches are drawn first, then rounds of each.
    """
    generator = torch.Generator().manual_seed(0)
    ratios = [_logs([b for _, b in pairs], [a for a, _ in pairs]) for pairs in launches]
    rounds = min(map(len, ratios))
    table = torch.stack([launch[:rounds] for launch in ratios])  # [launches, rounds]
    which = _draw(len(table), len(table), generator)  # [resamples, launches]
    when = _draw(rounds, len(table) * rounds, generator).view(RESAMPLES, len(table), rounds)
    drawn = table[which[:, :, None], when].flatten(1).median(1).values
    return _factor(table.median(), drawn)


def _logs(above: Sequence[float], below: Sequence[float]) -> Tensor:
    return (torch.tensor(above, dtype=torch.float64) / torch.tensor(below, dtype=torch.float64)).log()


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Indices below `count`, with replacement: [RESAMPLES, size]."""
    return torch.randint(count, (RESAMPLES, size), generator=generator)


def _factor(middle: Tensor, drawn: Tensor) -> Factor:
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).exp().tolist()
    return Factor(middle.exp().item(), low, high)
