# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements: every offset that is computed in 32 bits would wrap here."""

import pytest
import torch

import vitkern
from tests.helpers import gradients

SIDE, HEADS, CHANNELS = 1024, 34, 64  # 1024 * 1024 * 34 * 64 = 2.28e9 elements in one image
LEVELS = [(SIDE, SIDE)]


def free_gigabytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0


def corner_inputs(device: str):
    """The last pixel of the last head holds ones; two queries sample it and the first pixel."""
    value = torch.zeros(1, SIDE * SIDE, HEADS, CHANNELS, dtype=torch.bfloat16, device=device)
    assert value.numel() > 2**31
    value[0, -1, -1] = 1
    value[0, 0, 0] = 2
    locations = torch.empty(1, 2, HEADS, 1, 1, 2, device=device)
    locations[:, 0] = 0.25 / SIDE
    locations[:, 1] = 1 - 0.25 / SIDE
    return value, locations, torch.ones(1, 2, HEADS, 1, 1, device=device)


@pytest.mark.slow
@pytest.mark.skipif(free_gigabytes() < 16, reason="needs 16 GB of free memory")
def test_cpu_forward_and_backward_beyond_32_bit_offsets():
    check_far_corner("cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_forward_and_backward_beyond_32_bit_offsets(backend):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free device memory")
    check_far_corner(backend, "cuda")


def check_far_corner(backend, device):
    value, locations, weights = corner_inputs(device)

    def attend(value, locations, weights):
        return vitkern.ms_deform_attn(value, LEVELS, None, locations, weights, backend=backend)

    output, grad_value, _, grad_weights = gradients(attend, (value, locations, weights))
    output = output.view(2, HEADS, CHANNELS)
    share = 0.75 * 0.75  # a quarter of a pixel from the outer edge: the corner pixel's coefficient
    assert (output[0, 0] == 2 * share).all()
    assert (output[1, -1] == share).all()
    assert output.count_nonzero() == 2 * CHANNELS
    assert (grad_value[0, 0] == share).all()
    assert (grad_value[0, -1] == share).all()
    assert grad_value[0, 1:-1].view(torch.int16).amax() == 0
    assert grad_weights[0, 0, 0].item() == 2 * share * CHANNELS
    assert grad_weights[0, 1, -1].item() == share * CHANNELS
