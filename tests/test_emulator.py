# SPDX-License-Identifier: Apache-2.0
"""The CUDA emulator itself: its results are right, and it catches the faults that it is made for."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
import torch

from tests import emulated

pytestmark = [
    pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON)),
    pytest.mark.xdist_group("emulator"),  # one worker compiles its programs
]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Compiles a file of tests/emulator, once for each set of sanitizers."""
    folder, built = tmp_path_factory.mktemp("emulator"), {}

    def build(name: str, sanitize: str = ""):
        if (name, sanitize) not in built:
            built[name, sanitize] = emulated.compile_program(name, folder, sanitize)
        return built[name, sanitize]

    return build


def run(program, *arguments, backwards=False) -> str:
    environment = {**os.environ, "CUDA_EMU_ORDER": "1" if backwards else "0"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("sanitize", ["", emulated.SANITIZERS], ids=["plain", "sanitized"])
def test_primitives_compute_what_cuda_does(programs, sanitize, backwards):
    lines = (
        line.split() for line in run(programs("primitives.cu", sanitize), backwards=backwards).splitlines()
    )
    results = {name: [float(number) for number in numbers] for name, *numbers in lines}
    lanes = np.arange(32)
    up, down = np.where(lanes < 2, lanes, lanes - 2), np.where(lanes % 8 < 3, lanes + 5, lanes)
    ballot = np.int32(np.uint32(sum(1 << lane for lane in range(0, 32, 5))))
    expected = [np.full(32, 3), up, down, lanes ^ 1, np.full(32, ballot), lanes >= 16]
    numbers = [1.00048828125, 1.00146484375, 65519.9, 65520.0, 6e-8, 2.9e-8, 1e-5, -0.1]

    assert results["block_sums"] == (np.arange(64 * 256) % 97).reshape(64, 256).sum(1).tolist()
    assert results["reverse"] == list(range(99, -1, -1))
    assert results["shuffles"] == np.concatenate(expected).tolist()
    assert results["count"] == [140] * 5
    assert results["lost_halves"] == [0]
    torch.testing.assert_close(
        results["halves"], torch.tensor(numbers).half().float().tolist(), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(
        results["bfloats"], torch.tensor(numbers).bfloat16().float().tolist(), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("sanitize", ["", emulated.SANITIZERS], ids=["plain", "sanitized"])
def test_products_of_warps_and_copies_on_their_way(programs, sanitize, backwards):
    lines = run(programs("tensor_cores.cu", sanitize), backwards=backwards).splitlines()
    results = {name: [float(number) for number in numbers] for name, *numbers in map(str.split, lines)}
    left = (np.arange(16 * 32) % 7 - 3).reshape(16, 32)
    right = (np.arange(16 * 32) % 5 - 2).reshape(16, 32)

    copies = results.pop("copies")
    assert np.isnan(copies[:8]).all()
    assert copies[8:] == [1, 2, 3, 4, 0, 0, 0, 0]
    assert len(results) == 6
    for name, product in results.items():
        assert product == (left @ right.T).flatten().tolist(), name


def test_a_lane_that_stays_away_from_a_product_is_named(programs):
    output = run(programs("tensor_cores.cu"), "fault")
    assert "deadlock: of 32 threads 0 wait at __syncthreads, 31 in a warp operation, 1 have ended" in output


def test_a_missing_barrier_gives_wrong_results(programs):
    right = " ".join(str(63 - i) for i in range(64))
    outputs = [run(programs("faults.cu"), "missing_barrier", backwards=order) for order in (False, True)]
    assert any(output.strip() != right for output in outputs)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "divergent_barrier",
            "deadlock: of 64 threads 40 wait at __syncthreads, 0 in a warp operation, 24 have ended",
        ),
        ("lane_missing", "deadlock: of 64 threads 0 wait at __syncthreads, 31 in a warp operation"),
        ("caller_not_in_mask", "__shfl_sync by lane 16 whose mask lacks it"),
        ("source_not_in_mask", "__shfl_sync from lane 20, which takes no part"),
        ("different_operations", "lanes of a warp meet in __ballot_sync and __shfl_sync"),
    ],
)
def test_misuse_of_barriers_and_warps_is_named(programs, fault, message):
    output = run(programs("faults.cu"), fault)
    assert f"emulated kernel {fault}, block (0, 0, 0): " in output
    assert message in output


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shared_overrun", "index 64 out of bounds"),
        ("global_overrun", "heap-buffer-overflow"),
        ("dynamic_shared_overrun", "heap-buffer-overflow"),
    ],
)
def test_overruns_are_caught_by_the_sanitizers(programs, fault, message):
    output = run(programs("faults.cu", emulated.SANITIZERS), fault)
    assert message in output
    assert "faults.cu:" in output  # the report names the line
