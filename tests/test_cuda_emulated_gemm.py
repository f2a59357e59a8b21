# SPDX-License-Identifier: Apache-2.0
"""Paths of the CUDA kernels made of matrix products that only some sizes take, run by the emulator."""

from __future__ import annotations

import pytest
import torch

from tests import emulated, test_adapter_bottleneck, test_token_pool, test_token_project
from tests.runners import RUNNERS
from vitkern.cases import AdapterBottleneckCase, TokenCase

pytestmark = pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON))
RUNNER = next((runner for runner in RUNNERS if runner.name == "cuda-emulated"), None)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def emulator():
    with RUNNER.active():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, tokens", [(260, 3), (523, 16), (1040, 7), (300, 20), (150, 70)])
def test_pooling_of_more_channels_than_a_window_and_more_tokens_than_a_group(channels, tokens, dtype):
    case = TokenCase("wide", "", 1, 35, channels, tokens)
    test_token_pool.check(test_token_pool.make(case, RUNNER, dtype), RUNNER)


@pytest.mark.parametrize("recurrent", [False, True])
def test_pooling_of_split_pixels(recurrent):
    """Four tokens of bf16 and a thousand pixels make 31 splits, more than there are steps of 32 pixels to share out."""
    case = TokenCase("split", "", 2, 1000, 16, 4)
    tensors = test_token_pool.make(case, RUNNER, torch.bfloat16, recurrent=recurrent)
    test_token_pool.check(tensors, RUNNER)


@pytest.mark.slow
def test_many_rows_go_in_larger_blocks():
    """From 2^14 rows on a block takes 64 of them."""
    case = AdapterBottleneckCase("long", "", (2**14 + 5,), 8, 3)
    tensors = test_adapter_bottleneck.make(case, RUNNER, torch.bfloat16)
    test_adapter_bottleneck.check(tensors, RUNNER, activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_of_many_tokens(dtype):
    tensors = test_token_project.make(TokenCase("many", "", 1, 20, 24, 100), RUNNER, dtype, keys=9)
    test_token_project.check(tensors, RUNNER)


def test_what_does_not_fit_is_refused_by_name():
    tensors = test_token_project.make(TokenCase("too many", "", 1, 20, 8, 2000), RUNNER, keys=4)
    with pytest.raises(RuntimeError, match="token_project: so many tokens do not fit"):
        test_token_project.call("cuda")(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_multiples_of_16_bytes_and_addresses_that_are(dtype):
    """Scalars take the place of vectors: in one tensor by its address, in the others by their width."""
    case = AdapterBottleneckCase("odd", "", (20,), 24, 16)
    tensors = test_adapter_bottleneck.make(case, RUNNER, dtype)
    shifted = torch.empty(20 * 24 + 1, dtype=dtype)[1:].view(20, 24)
    tensors["x"] = shifted.copy_(tensors["x"])
    test_adapter_bottleneck.check(tensors, RUNNER)
