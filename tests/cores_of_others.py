# SPDX-License-Identifier: Apache-2.0
"""Functions that sample, written from their interfaces, and layers that hold such functions in various ways."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def sampled(value, shapes, locations, weights, counts):
    """The samples' weighted sums for value [B, M, D, S], locations [B, Q, M, K, 2], weights [B, Q, M, K]."""
    batch, heads, channels, _ = value.shape
    found = []
    pixels = value.flatten(0, 1).split([height * width for height, width in shapes], -1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).split(counts, 2)
    for image, grid, (height, width) in zip(pixels, grids, shapes):
        image = image.reshape(batch * heads, channels, height, width)
        found.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]
    output = (torch.cat(found, -1) * weights).sum(-1)
    return output.view(batch, heads * channels, -1).transpose(1, 2)


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    counts = [sampling_locations.shape[4]] * sampling_locations.shape[3]
    where, weights = sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4)
    return sampled(value.permute(0, 2, 3, 1), value_spatial_shapes, where, weights, counts)


def deformable_attention_core_func_v2(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    """value [B, S, M, D]"""
    assert method == "default"
    value = value.permute(0, 2, 3, 1)
    return sampled(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list)


def core_of_levels(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    """value: a list of [B, M, D, S_l]"""
    assert method == "default"
    value = torch.cat([value[level] for level in range(len(num_points_list))], -1)
    return sampled(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list)


class Layer(nn.Module):
    """A layer of two levels and four heads of eight channels, with several results."""

    counts = (4, 4)

    def __init__(self):
        super().__init__()
        self.offsets, self.logits, self.values = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, points, pixels, shapes):
        where = points[:, :, None, None] + 0.1 * self.offsets(x).unflatten(-1, (4, 8, 2)).tanh()
        weights = self.logits(x).unflatten(-1, (4, 8)).sigmoid()
        value = self.values(pixels).unflatten(-1, (4, 8))
        return self.sample(value, shapes, where, weights), where

    def sample(self, value, shapes, where, weights):
        raise NotImplementedError


class OfGlobal(Layer):
    def sample(self, value, shapes, where, weights):
        where, weights = where.unflatten(3, (2, 4)), weights.unflatten(3, (2, 4))
        return multi_scale_deformable_attn_pytorch(value, shapes, where, weights)


def helper(value, shapes, where, weights):
    return multi_scale_deformable_attn_pytorch(value, shapes, where, weights)


class OfHelper(OfGlobal):
    def sample(self, value, shapes, where, weights):
        return helper(value, shapes, where.unflatten(3, (2, 4)), weights.unflatten(3, (2, 4)))


class OfDefault(Layer):
    def sample(self, value, shapes, where, weights, core=multi_scale_deformable_attn_pytorch):
        return core(value, shapes, where.unflatten(3, (2, 4)), weights.unflatten(3, (2, 4)))


class OfKeyword(Layer):
    """A default of an argument that takes a name only."""

    def sample(self, value, shapes, where, weights, *, core=multi_scale_deformable_attn_pytorch):
        return core(value, shapes, where.unflatten(3, (2, 4)), weights.unflatten(3, (2, 4)))


class OfAttribute(Layer):
    def __init__(self):
        super().__init__()
        self.core = multi_scale_deformable_attn_pytorch

    def sample(self, value, shapes, where, weights):
        return self.core(value, shapes, where.unflatten(3, (2, 4)), weights.unflatten(3, (2, 4)))


class OfPartial(Layer):
    """Holds the function as RT-DETR v2 does, in a partial."""

    def __init__(self):
        super().__init__()
        self.core = functools.partial(deformable_attention_core_func_v2, method="default")

    def sample(self, value, shapes, where, weights):
        return self.core(value, shapes, where, weights, [3, 5])


class OfLevels(Layer):
    """Passes the value as D-FINE does, as a list of levels."""

    def __init__(self):
        super().__init__()
        self.core = functools.partial(core_of_levels, method="default")

    def sample(self, value, shapes, where, weights):
        value = value.permute(0, 2, 3, 1).split([int(h) * int(w) for h, w in shapes], -1)
        return self.core(list(value), shapes, where, weights, [3, 5])


HOLDERS = (OfGlobal, OfHelper, OfDefault, OfKeyword, OfPartial, OfLevels)
