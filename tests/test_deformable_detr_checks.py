# SPDX-License-Identifier: Apache-2.0
"""The checks of Deformable-DETR's op test, written anew for the CPU: the same sizes, tolerances and widths.

The formula in plain torch in double and in float, and gradcheck in double for a width of each kind. With a checkout of
https://github.com/fundamentalvision/Deformable-DETR in VITKERN_DEFORMABLE_DETR, its own test runs too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitkern
from tests.test_large_tensors import free_gigabytes
from vitkern.reference import ms_deform_attn_by_grid_sample

IMAGES, HEADS, QUERIES, POINTS = 1, 2, 2, 2
SHAPES = torch.tensor([[6, 4], [3, 2]])
STARTS = torch.tensor([0, 24])
PIXELS = 30
LEVELS = len(SHAPES)


def make(channels, dtype=torch.float64):
    torch.manual_seed(3)
    value = torch.rand(IMAGES, PIXELS, HEADS, channels, dtype=dtype) * 0.01
    locations = torch.rand(IMAGES, QUERIES, HEADS, LEVELS, POINTS, 2, dtype=dtype)
    weights = torch.rand(IMAGES, QUERIES, HEADS, LEVELS, POINTS, dtype=dtype) + 1e-5
    return value, locations, weights / weights.sum((-1, -2), keepdim=True)


def attend(value, locations, weights):
    return vitkern.ms_deform_attn(value, SHAPES, STARTS, locations, weights)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, {}), (torch.float32, {"rtol": 1e-2, "atol": 1e-3})]
)
def test_forward_equals_the_formula_in_plain_torch(dtype, tolerance):
    value, locations, weights = make(2, dtype)
    expected = ms_deform_attn_by_grid_sample(value, SHAPES.tolist(), locations, weights)
    assert torch.allclose(attend(value, locations, weights), expected, **tolerance)


def gradients_are_right(channels, fast_mode):
    inputs = tuple(tensor.requires_grad_() for tensor in make(channels))
    return torch.autograd.gradcheck(attend, inputs, fast_mode=fast_mode)


@pytest.mark.parametrize("channels", [30, 32, 64, 71])
def test_gradcheck(channels):
    assert gradients_are_right(channels, fast_mode=False)


@pytest.mark.alone
@pytest.mark.slow
def test_gradcheck_of_a_width_beyond_a_thread_block():
    """The full Jacobian of 1025 channels takes 14 GB; with less free memory, the fast mode checks random directions."""
    assert gradients_are_right(1025, fast_mode=free_gigabytes() < 18)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(
    "VITKERN_DEFORMABLE_DETR" not in os.environ, reason="VITKERN_DEFORMABLE_DETR names no checkout"
)
def test_its_own_test(tmp_path):
    """The test runs on the CPU, without the widths whose Jacobians need too much memory."""
    ops = Path(os.environ["VITKERN_DEFORMABLE_DETR"]) / "models" / "ops"
    text, widths = (ops / "test.py").read_text(encoding="utf-8"), "[30, 32, 64, 71, 1025, 2048, 3096]"
    assert widths in text and ".cuda()" in text
    smaller = "[30, 32, 64, 71, 1025]" if free_gigabytes() > 18 else "[30, 32, 64, 71]"
    script = tmp_path / "test.py"
    script.write_text(text.replace(".cuda()", "").replace(widths, smaller), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "vitkern", "run", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ops), *sys.path])},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    verdicts = [line.split()[:2] for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert verdicts == [["*", "True"]] * (2 + smaller.count(",") + 1)
