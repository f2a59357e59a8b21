# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for mmcv's own test of the op: its file runs unchanged, and "cuda" is the CPU.

With vitkern installed as mmcv's compiled module: `vitkern run -m pytest -p tests.ecosystem.cuda_is_cpu FILE`.
"""

from __future__ import annotations

import pytest
import torch
from mmcv import utils

utils.IS_CUDA_AVAILABLE = True
for _name in ("MLU", "MUSA", "NPU"):  # files of other versions ask for more devices
    if not hasattr(utils, f"IS_{_name}_AVAILABLE"):
        setattr(utils, f"IS_{_name}_AVAILABLE", False)

TOO_LARGE = "its Jacobian of 1025 channels takes 14 GB"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "1025" in item.name:
            item.add_marker(pytest.mark.skip(reason=TOO_LARGE))


@pytest.fixture(autouse=True)
def _cuda_is_cpu(monkeypatch):
    to = torch.Tensor.to

    def to_cpu(self, *given, **named):
        is_cuda = [isinstance(each, (str, torch.device)) and str(each).startswith("cuda") for each in given]
        return to(self, *("cpu" if cuda else each for each, cuda in zip(given, is_cuda)), **named)

    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
