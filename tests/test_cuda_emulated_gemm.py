# SPDX-License-Identifier: Apache-2.0
"""Size-dependent paths of the CUDA kernels made of matrix products, run by the emulator."""

from __future__ import annotations

import pytest
import torch

import vitkern
from tests import emulated
from tests.helpers import assert_right
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
    assert_right("token_pool", case, dtype, backend="cuda")


@pytest.mark.parametrize("recurrent", [False, True])
def test_pooling_of_split_pixels(recurrent):
    """Four tokens of bf16 and a thousand pixels in up to 31 splits: more than there are steps of 32 pixels for all."""
    case = TokenCase("split", "", 2, 1000, 16, 4)
    assert_right("token_pool", case, torch.bfloat16, backend="cuda", recurrent=recurrent)


@pytest.mark.slow
def test_many_rows_go_in_larger_blocks():
    """From 2^14 rows on, a block takes 64 rows."""
    case = AdapterBottleneckCase("long", "", (2**14 + 5,), 8, 3)
    assert_right("adapter_bottleneck", case, torch.bfloat16, backend="cuda", activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_of_many_tokens(dtype):
    assert_right("token_project", TokenCase("many", "", 1, 20, 24, 100), dtype, backend="cuda", keys=9)


def test_what_does_not_fit_is_refused_by_name():
    tensors = TokenCase("too many", "", 1, 20, 8, 2000).make_project(keys=4)
    with pytest.raises(RuntimeError, match="token_project: so many tokens do not fit"):
        vitkern.token_project(*tensors, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_multiples_of_16_bytes_and_addresses_that_are(dtype):
    """Scalars replace vectors: in one tensor because of its address, in the others because of their width."""
    assert_right(
        "adapter_bottleneck",
        AdapterBottleneckCase("odd", "", (20,), 24, 16),
        dtype,
        backend="cuda",
        layout=one_after_a_vector,
    )


def one_after_a_vector(tensor):
    if tensor.shape != (20, 24):
        return tensor
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)
