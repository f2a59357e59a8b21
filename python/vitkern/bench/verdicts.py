# SPDX-License-Identifier: Apache-2.0
"""Whether two sets of times differ: ratios of times taken side by side, a bootstrap interval, and a verdict.

Times on a shared machine drift with the hour, so ratios are compared: to an anchor that was timed in turn, or to the
other build. The interval comes from drawing the samples again, not from an assumption about their distribution.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Factor:
    """The factor by which B takes longer than A, and its interval."""

    middle: float
    low: float
    high: float

    def verdict(self, smallest: float, moved: float = 1.0) -> str:
        """ "slower" and "faster" need an interval without 1 and an effect that is worth a name.

        If clocks `moved` by a factor, the verdict has to be the same with this factor times or over theirs. Otherwise
        it is "ambiguous": the clock alone may have made it.
        """
        found = {self._of(smallest, clock) for clock in (1 / moved, 1.0, moved)}
        return found.pop() if len(found) == 1 else "ambiguous"

    def _of(self, smallest: float, clock: float) -> str:
        if clock * self.low > 1 and clock * self.middle >= 1 + smallest:
            return "slower"
        if clock * self.high < 1 and clock * self.middle <= 1 / (1 + smallest):
            return "faster"
        return "no difference"


def moved(megahertz: Iterable[float]) -> float:
    """The factor between a card's highest and lowest clock, a tenth at either end left out; 1 where none is known."""
    known = list(megahertz)
    if len(known) < 2:
        return 1.0
    tenths = statistics.quantiles(known, n=10, method="inclusive")
    return tenths[-1] / tenths[0]


# Times taken in turn: [visits][rounds] pairs of divisor and dividend.
Visits = Sequence[Sequence[tuple[float, float]]]


def factor_by_anchor(a: Visits, b: Visits) -> Factor:
    """The factor by which the ratio of the row to its anchor has grown from run A to run B; pairs are (anchor, row)."""
    (middle_of_a, drawn_of_a), (middle_of_b, drawn_of_b) = (
        _middles(visits, seed) for seed, visits in enumerate((a, b))
    )
    return _factor(middle_of_b - middle_of_a, drawn_of_b - drawn_of_a)


def factor_of_pairs(launches: Visits) -> Factor:
    """The factor between two builds timed in turn; pairs are (A, B)."""
    return _factor(*_middles(launches, 0))


def _middles(visits: Visits, seed: int) -> tuple[Tensor, Tensor]:
    """The logarithm of the ratio, and [RESAMPLES] values that it may have as well.

    The least of a visit counts, since other processes can only add to it. Visits differ by more, as the memory lies
    elsewhere in each: the middle visit counts. The bootstrap draws visits first, then rounds of each.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = min(map(len, visits))
    times = torch.tensor(
        [list(visit)[:rounds] for visit in visits], dtype=torch.float64
    )  # [visits, rounds, 2]
    which = torch.randint(len(times), (RESAMPLES, len(times), 1), generator=generator)
    when = torch.randint(rounds, (RESAMPLES, len(times), rounds), generator=generator)
    return _middle(times), _middle(times[which, when])


def _middle(times: Tensor) -> Tensor:  # [..., visits, rounds, 2] -> [...]
    below, above = times.amin(-2).log().unbind(-1)
    return (above - below).quantile(0.5, dim=-1)


def _factor(middle: Tensor, drawn: Tensor) -> Factor:
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).exp().tolist()
    return Factor(middle.exp().item(), low, high)
