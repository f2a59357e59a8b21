# SPDX-License-Identifier: Apache-2.0
"""Weights that depend only on their key and shape, so that no file has to hold them."""

import zlib

import torch


def seeded(key, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    return torch.randn(tuple(shape), generator=generator)


def weight(key, tensor):
    """The tensor of that name: of the magnitude that training gives to its kind, and nowhere zero."""
    drawn = seeded(key, tensor.shape)
    if key.endswith("running_var"):
        return drawn.abs() * 0.5 + 0.5
    if key.endswith("running_mean"):
        return drawn * 0.1
    if key.endswith("sampling_offsets.bias"):
        return drawn * 1.5
    if tensor.dim() <= 1:
        return 1.0 + 0.1 * drawn if key.endswith("weight") or "gamma" in key else 0.1 * drawn
    if key.endswith("sampling_offsets.weight"):
        return drawn * 0.1
    if any(part in key for part in ("relative_position_bias_table", "pos_embed", "level_embed", "cls_token")):
        return drawn * 0.2
    return drawn * (1.0 / tensor[0].numel()) ** 0.5


@torch.no_grad()
def fill(model):
    """Sets every floating tensor of the state dict to these weights and returns the model."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(weight(key, tensor))
    return model
