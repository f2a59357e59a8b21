# SPDX-License-Identifier: Apache-2.0
"""Patched detectors compiled for images of any size: after the second size, nothing is compiled again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitkern
from tests.ecosystem.detectors import DETECTORS

pytestmark = pytest.mark.slow
# rfdetr compiles a part of its backbone, which caches position encodings by size, for each size.
SIZES = {"rt_detr_v2": (64, 96, 128), "rfdetr": (64, 96)}


def leaves(given: object) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given] if given.requires_grad else []
    each = given.values() if isinstance(given, dict) else given if isinstance(given, (list, tuple)) else ()
    return [tensor for one in each for tensor in leaves(one)]


def step(model: nn.Module, size: int) -> Tensor:
    """The sum of all outputs for a drawn image of this size, after its backward pass."""
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    total = sum(each.sum() for each in leaves(model(pixels)))
    total.backward()
    return total.detach()


@pytest.mark.parametrize(
    "detector, sizes", [(DETECTORS[name], each) for name, each in SIZES.items()], ids=SIZES
)
def test_no_size_after_the_second_is_compiled(detector, sizes):
    if detector.reason:
        pytest.skip(detector.reason)
    model = detector.build()
    assert vitkern.patch(model, strict=True)
    expected = [step(model, size) for size in sizes]
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    found = [step(compiled, size) for size in sizes[:2]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [step(compiled, size) for size in sizes[2:]]
        again = [step(compiled, size) for size in sizes]
    for total, ours, later in zip(expected, found, again):
        torch.testing.assert_close(ours, total, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(later, total, rtol=1e-4, atol=1e-3)
