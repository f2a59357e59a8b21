# SPDX-License-Identifier: Apache-2.0
"""`vitkern models`: a table of the models, counted on meta tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitkern.models.registry import create_model, entry, list_models
from vitkern.ops import flops as flops


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds of one forward pass, including this package's ops."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def main(pattern: str = "*") -> int:
    names = list_models(pattern)
    if not names:
        print(f"no model is named like {pattern!r}")
        return 1
    print(f"{'model':<28}{'parameters':>14}{'GMACs':>10}   input")
    for name in names:
        size = entry(name).img_size
        with torch.device("meta"):
            model = create_model(name).eval()
            shape = getattr(model, "input_shape", (3, size, size))  # video models define input_shape
            macs = count_macs(model, torch.empty(1, *shape)) / 1e9
        print(
            f"{name:<28}{count_parameters(model):>14,}{macs:>10.2f}   {' x '.join(map(str, shape))}",
            flush=True,
        )
    return 0
