# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels give the same results for any order of their threads, which may switch at any memory access."""

from __future__ import annotations

import os

import pytest
import torch

from tests import races
from tests.race_cases import CASES

pytestmark = pytest.mark.skipif(races.REASON is not None, reason=str(races.REASON))
SEEDS = int(os.environ.get("VITKERN_SEEDS", "3"))  # of a case; the cases of a kernel are nine at least


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_every_schedule_gives_the_same_bits(number):
    """Except sums by atomics, which are as exact as plain torch's in any order. Each case has seeds of its own."""
    case = CASES[number]
    call = case.make()
    with races.kernels(BLOCKS=case.blocks, RACES=0):
        expected = call.run()
    if case.blocks is None:
        call.assert_right(expected)
    for seed in range(1 + number * SEEDS, 1 + (number + 1) * SEEDS):
        with races.kernels(BLOCKS=case.blocks, RACES=0, SEED=seed):
            actual = call.run()
        for name, a, e in zip(call.names, actual, expected):
            if name == call.atomic:
                call.assert_right(actual, name)
            else:
                same = torch.equal(a.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8))
                assert same, f"{name} of {case} is another with CUDA_EMU_SEED={seed}"
