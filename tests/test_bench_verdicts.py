# SPDX-License-Identifier: Apache-2.0
"""Verdicts of `vitkern bench compare`: equal builds show no difference, a slower one is found."""

import math

import pytest
import torch

from tests.bench_records import row
from vitkern.bench.compare import compare_records
from vitkern.bench.verdicts import Factor, factor_by_anchor, factor_of_pairs

TRIALS = 200


class Noise:
    """Times as on a shared machine: a few per cent of scatter to the slow side, and sometimes a busy neighbour."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def times(self, count: int, milliseconds: float) -> list[float]:
        scatter = 0.03 * torch.randn(count, generator=self.generator).abs()
        is_hit = torch.rand(count, generator=self.generator) < 0.1
        hit = is_hit * torch.rand(count, generator=self.generator)
        return (milliseconds * (1 + scatter + hit)).tolist()

    def visits(self, count: int, below: float, above: float) -> list[list[tuple[float, float]]]:
        """Each visit has a constant offset of a per cent or two, as from another address of its memory."""
        found = []
        for _ in range(count):
            a, b = (1 + 0.01 * torch.randn(2, generator=self.generator)).tolist()
            found.append(list(zip(self.times(5, a * below), self.times(5, b * above))))
        return found


def verdicts_by_anchor(slower: float, hour: float = 1.0) -> list[str]:
    """`hour`: the factor by which the whole machine is slower while B runs."""
    noise = Noise(0)
    found = []
    for _ in range(TRIALS):
        a, b = noise.visits(3, 1.0, 2.0), noise.visits(3, hour, 2.0 * slower * hour)
        found.append(factor_by_anchor(a, b).verdict(0.05))
    return found


def verdicts_of_pairs(slower: float) -> list[str]:
    noise = Noise(1)
    return [factor_of_pairs(noise.visits(5, 1.0, slower)).verdict(0.05) for _ in range(TRIALS)]


@pytest.mark.parametrize("verdicts", [verdicts_by_anchor, verdicts_of_pairs])
def test_equals_show_no_difference(verdicts):
    assert verdicts(1.0).count("no difference") >= 0.95 * TRIALS


@pytest.mark.parametrize("verdicts", [verdicts_by_anchor, verdicts_of_pairs])
@pytest.mark.parametrize("slower, name", [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_fifth_is_seen(verdicts, slower, name):
    assert verdicts(slower).count(name) >= 0.95 * TRIALS


@pytest.mark.parametrize("verdicts", [verdicts_by_anchor, verdicts_of_pairs])
def test_what_is_too_small_to_matter_is_no_difference(verdicts):
    assert verdicts(1.02).count("slower") <= 0.05 * TRIALS


def test_an_hour_in_which_everything_is_slower_is_no_difference():
    assert verdicts_by_anchor(1.0, hour=1.7).count("no difference") >= 0.95 * TRIALS


def test_a_build_that_is_slower_in_an_hour_in_which_everything_is_faster_is_slower():
    assert verdicts_by_anchor(1.2, hour=0.6).count("slower") >= 0.95 * TRIALS


def test_the_factor_is_that_of_b_over_a():
    factor = factor_by_anchor([[(1.0, 2.0)] * 5] * 3, [[(1.0, 3.0)] * 5] * 3)
    assert all(math.isclose(value, 1.5) for value in vars(factor).values())


def test_one_launch_in_which_all_is_different_does_not_make_a_verdict():
    launches = [[(1.0, 1.0)] * 5] * 4 + [[(1.0, 1.5)] * 5]
    assert factor_of_pairs(launches).verdict(0.05) == "no difference"


@pytest.mark.parametrize(
    "factor, verdict",
    [
        (Factor(1.10, 1.02, 1.2), "slower"),
        (Factor(1.10, 0.99, 1.2), "no difference"),
        (Factor(1.04, 1.02, 1.1), "no difference"),
        (Factor(0.90, 0.85, 0.98), "faster"),
        (Factor(0.90, 0.85, 1.01), "no difference"),
    ],
)
def test_a_verdict_needs_an_interval_without_one_and_an_effect(factor, verdict):
    assert factor.verdict(0.05) == verdict


def test_rows_are_matched_by_what_was_measured_and_strays_are_listed():
    a = {"rows": [row("same"), row("slow"), row("gone"), row("broken"), row("mended", reason="wrong")]}
    b = {
        "rows": [
            row("new"),
            row("mended"),
            row("broken", reason="wrong"),
            row("slow", slower=1.3),
            row("same"),
        ]
    }
    compared = compare_records(a, b, smallest=0.05)
    assert {one.key[1]: one.verdict for one in compared} == {
        "same": "no difference",
        "slow": "slower",
        "gone": "only in A",
        "broken": "FAILED in B: wrong",
        "mended": "FAILED in A: wrong",
        "new": "only in B",
    }
    assert [one.key[1] for one in compared if one.is_worse] == ["slow", "broken"]
    assert all(one.verdict in one.line() for one in compared)
