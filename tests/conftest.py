# SPDX-License-Identifier: Apache-2.0
"""The setting of every test: interpreted Triton where there is no GPU, repeatable randomness, runners of kernels."""

import os
import sys

# Read when torch loads its OpenMP. Threads that spin while they wait slow down other processes, first the next
# worker of pytest-xdist: many small calls, as gradcheck makes them, then take twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# cuBLAS, which the oracle calls, needs this in torch's deterministic mode. Read when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Read when torch compiles. Its caches identify an op by its name only, and would return code that was compiled when the
# op's results had other shapes.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch

if not torch.cuda.is_available():
    # Read when the kernels are decorated, so before any import of them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from tests.runners import RUNNERS, Runner

settings.register_profile("vitkern", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("vitkern")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Resets Dynamo, which compiles a function at most eight times, for all models of all tests together."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=[pytest.param(runner, id=runner.name, marks=runner.marks) for runner in RUNNERS])
def runner(request) -> Runner:
    """One way to run the kernels: an instruction set, the CUDA emulator, the Triton interpreter, a GPU."""
    with request.param.active():
        yield request.param
