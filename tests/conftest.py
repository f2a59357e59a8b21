# SPDX-License-Identifier: Apache-2.0
"""What every test may count on: interpreted Triton where there is no GPU, repeatable randomness, runners of kernels."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when the kernels are decorated, so before any import of them

import pytest
from hypothesis import settings

from tests.runners import RUNNERS, Runner

settings.register_profile("vitkern", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("vitkern")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(params=[pytest.param(runner, id=runner.name, marks=runner.marks) for runner in RUNNERS])
def runner(request) -> Runner:
    """One way to run the kernels: an instruction set, the CUDA emulator, the Triton interpreter, a GPU."""
    with request.param.active():
        yield request.param
