# SPDX-License-Identifier: Apache-2.0
"""Whether two sets of times differ: ratios of what was timed side by side, a bootstrap interval, and a verdict.

Times on a shared machine drift with the hour, so what is compared are ratios: to an anchor that was timed in turn, or
to the other build. The interval comes from drawing the samples again, not from an assumption about their distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95


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
    """Of times (of A, of B) taken in turn, in several launches of both processes.

    In a launch the least of each counts, which neighbours can only add to. Launches differ by more than that, as memory
    lies elsewhere in each: the middle one counts, and the interval comes from drawing launches, then rounds of each.
    """
    generator = torch.Generator().manual_seed(0)
    rounds = min(map(len, launches))
    times = torch.tensor(
        [launch[:rounds] for launch in launches], dtype=torch.float64
    )  # [launches, rounds, 2]
    which = _draw(len(times), len(times), generator)  # [resamples, launches]
    when = _draw(rounds, len(times) * rounds, generator).view(RESAMPLES, len(times), rounds)
    return _factor(_middle_of_launches(times), _middle_of_launches(times[which[:, :, None], when]))


def _middle_of_launches(times: Tensor) -> Tensor:  # [..., launches, rounds, 2] -> [...]
    a, b = times.amin(-2).log().unbind(-1)
    return (b - a).median(-1).values


def _logs(above: Sequence[float], below: Sequence[float]) -> Tensor:
    return (torch.tensor(above, dtype=torch.float64) / torch.tensor(below, dtype=torch.float64)).log()


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Indices below `count`, with replacement: [RESAMPLES, size]."""
    return torch.randint(count, (RESAMPLES, size), generator=generator)


def _factor(middle: Tensor, drawn: Tensor) -> Factor:
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).exp().tolist()
    return Factor(middle.exp().item(), low, high)
