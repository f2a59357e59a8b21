# SPDX-License-Identifier: Apache-2.0
"""Deformable attention as current projects write it, from their interfaces: stand-ins for projects not installed here.

Each class has an `example` of its arguments. All have 4 heads of 8 channels and two levels of 3 x 4 and 2 x 2 pixels.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from tests.layer_for_export import Exported as Exported

HEADS, LEVELS, POINTS, WIDTH, QUERIES = 4, 2, 2, 32, 5
SIZES = [(3, 4), (2, 2)]
PIXELS = 16


def grids_of(value, sizes, locations, counts):
    """Samples [B * M, D, Q, K] of a value [B, M, D, S] at locations [B, Q, M, K, 2]."""
    found = []
    pixels = value.flatten(0, 1).split([int(h) * int(w) for h, w in sizes], -1)
    for image, grid, (h, w) in zip(
        pixels, (2 * locations - 1).transpose(1, 2).flatten(0, 1).split(counts, 2), sizes
    ):
        image = image.reshape(image.shape[0], image.shape[1], int(h), int(w))
        found.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    return torch.cat(found, -1)


def weighted(samples, weights):
    batch, queries, heads, _ = weights.shape
    output = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return output.view(batch, -1, queries).transpose(1, 2)


def flat_core(value, value_shapes, sampling_locations, attention_weights):
    """ultralytics' core: levels and points on one axis, the same number of points on each level."""
    counts = [sampling_locations.shape[3] // len(value_shapes)] * len(value_shapes)
    return weighted(
        grids_of(value.permute(0, 2, 3, 1), value_shapes, sampling_locations, counts), attention_weights
    )


def on_other_devices(image, grid):
    raise NotImplementedError


def sample(image, grid):
    if image.device.type not in ("mps", "xla"):
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    inside = (grid >= -1) & (grid <= 1)
    return on_other_devices(image * inside, grid)


def channels_core(value, spatial_shapes, sampling_locations, attention_weights, spatial_shapes_hw=None):
    """rfdetr's core: value [B, M, D, S], locations with one axis or two, sizes as a tensor and optionally as pairs."""
    batch, heads, channels, _ = value.shape
    shapes = spatial_shapes_hw if spatial_shapes_hw is not None else spatial_shapes
    merged = sampling_locations.ndim == 5
    levels = len(shapes)
    points = sampling_locations.shape[3] // levels if merged else sampling_locations.shape[4]
    pixels = [value] if levels == 1 else value.split([int(h) * int(w) for h, w in shapes], 3)
    found = []
    for level, (h, w) in enumerate(shapes):
        where = (
            sampling_locations[:, :, :, level * points : (level + 1) * points]
            if merged
            else (sampling_locations[:, :, :, level])
        )
        image = pixels[level].reshape(batch * heads, channels, int(h), int(w))
        found.append(sample(image, (2 * where - 1).transpose(1, 2).flatten(0, 1)))
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, -1, levels * points)
    return (torch.cat(found, -1) * weights).sum(-1).view(batch, heads * channels, -1).transpose(1, 2)


def levels_core(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    """D-FINE's core: value as a list of levels [B, M, D, S_l], any number of points on each."""
    assert method == "default"
    every = torch.cat([value[level] for level in range(len(num_points_list))], -1)
    return weighted(
        grids_of(every, value_spatial_shapes, sampling_locations, num_points_list), attention_weights
    )


def maps_core(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list):
    """The core of LibreYOLO's GTR: value as a list of maps [B * M, D, H, W]."""
    grids = (2 * sampling_locations - 1).permute(0, 2, 1, 3, 4).flatten(0, 1).split(num_points_list, -2)
    found = [
        F.grid_sample(value[level], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for level, grid in enumerate(grids)
    ]
    return weighted(torch.cat(found, -1), attention_weights)


def nameless_core(v, hw, xy, p):
    """A core whose argument names give no role."""
    counts = [xy.shape[4]] * xy.shape[3]
    return weighted(grids_of(v.permute(0, 2, 3, 1), hw, xy.flatten(3, 4), counts), p.flatten(3, 4))


def plain_core(value, value_spatial_shapes, sampling_locations, attention_weights):
    return nameless_core(value, value_spatial_shapes, sampling_locations, attention_weights)


def compiled_forward(value, shapes, starts, locations, weights, step):
    with torch.no_grad():
        return plain_core(value, shapes.tolist(), locations, weights)


def compiled_backward(value, shapes, starts, locations, weights, gradient, step):
    leaves = [each.detach().requires_grad_() for each in (value, locations, weights)]
    with torch.enable_grad():
        output = plain_core(leaves[0], shapes.tolist(), *leaves[1:])
    return torch.autograd.grad(output, leaves, gradient)


MSDA = ModuleType("MSDA")  # in place of a compiled module
MSDA.ms_deform_attn_forward, MSDA.ms_deform_attn_backward = compiled_forward, compiled_backward


class MSDeformAttnFunction(torch.autograd.Function):
    """The autograd function on the compiled module."""

    @staticmethod
    def forward(
        ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, weights, im2col_step
    ):
        ctx.im2col_step = im2col_step
        output = MSDA.ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, sampling_locations, weights, im2col_step
        )
        ctx.save_for_backward(
            value, value_spatial_shapes, value_level_start_index, sampling_locations, weights
        )
        return output

    @staticmethod
    def backward(ctx, grad_output):
        value, shapes, starts, locations, weights = ctx.saved_tensors
        gradients = MSDA.ms_deform_attn_backward(
            value, shapes, starts, locations, weights, grad_output, ctx.im2col_step
        )
        return gradients[0], None, None, gradients[1], gradients[2], None


def tensors():
    draw = torch.Generator().manual_seed(0)
    query, pixels = (torch.rand(2, n, WIDTH, generator=draw).requires_grad_() for n in (QUERIES, PIXELS))
    return query, pixels, torch.rand(2, QUERIES, 1, 2, generator=draw), torch.tensor(SIZES)


class Attention(nn.Module):
    """The common base: projections, locations [B, Q, M, K, 2] and weights [B, Q, M, K]."""

    def __init__(self, points=LEVELS * POINTS, width=WIDTH):
        super().__init__()
        self.im2col_step = 64
        self.sampling_offsets = nn.Linear(width, HEADS * points * 2)
        self.attention_weights = nn.Linear(width, HEADS * points)
        self.value_proj, self.output_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def where(self, query, refer):
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, -1, 2))
        logits = self.attention_weights(query).unflatten(-1, (HEADS, -1))
        return refer[:, :, None] + 0.1 * offsets.tanh(), logits.softmax(-1)

    @staticmethod
    def example():
        query, pixels, points, shapes = tensors()
        return query, points, pixels, shapes


class Flat(Attention):
    """ultralytics' layer."""

    def forward(self, query, refer_bbox, value, value_shapes, value_mask=None):
        value = self.value_proj(value)
        if value_mask is not None:
            value = value.masked_fill(value_mask[..., None], float(0))
        where, weights = self.where(query, refer_bbox)
        return self.output_proj(flat_core(value.unflatten(-1, (HEADS, -1)), value_shapes, where, weights))

    @staticmethod
    def example():
        query, pixels, points, _ = tensors()
        return query, points, pixels, SIZES


class Channels(Attention):
    """rfdetr's layer: an export branch, pairs of sizes, value [B, M, D, S]."""

    export = False

    def forward(
        self, query, reference_points, input_flatten, input_spatial_shapes, input_spatial_shapes_hw=None
    ):
        where, weights = self.where(query, reference_points)
        where = where if self.export else where.unflatten(3, (LEVELS, POINTS))
        value = self.value_proj(input_flatten).transpose(1, 2).unflatten(1, (HEADS, -1))
        core = channels_core(
            value, input_spatial_shapes, where, weights, spatial_shapes_hw=input_spatial_shapes_hw
        )
        return self.output_proj(core)


class PairsToo(Channels):
    """The same with pairs of sizes beside the tensor."""

    @staticmethod
    def example():
        return *Attention.example(), SIZES


class Levels(Attention):
    """D-FINE's layer: no projection, the core in a partial, a buffer of factors."""

    def __init__(self):
        super().__init__(points=4)
        self.num_points_list = [1, 3]
        self.register_buffer("num_points_scale", torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]))
        self.ms_deformable_attn_core = functools.partial(levels_core, method="default")

    def forward(self, query, reference_points, value, value_spatial_shapes):
        where, weights = self.where(query, reference_points)
        where = where * (1 + 0.01 * self.num_points_scale[:, None])
        return self.ms_deformable_attn_core(value, value_spatial_shapes, where, weights, self.num_points_list)

    @staticmethod
    def example():
        query, pixels, points, _ = tensors()
        value = pixels.unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1).split([h * w for h, w in SIZES], -1)
        return query, points, list(value), SIZES


def either_core(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    """RT-DETR v2's layer: bilinear samples, or nearest pixels without a gradient of the locations."""
    if method == "default":
        samples = grids_of(
            value.permute(0, 2, 3, 1), value_spatial_shapes, sampling_locations, num_points_list
        )
        return weighted(samples, attention_weights)
    found, first = [], 0
    points = sampling_locations.permute(0, 2, 1, 3, 4).flatten(0, 1).split(num_points_list, -2)
    every = value.permute(0, 2, 3, 1).flatten(0, 1)
    for where, (h, w) in zip(points, value_spatial_shapes):
        pixel = (where * torch.tensor([w, h]) + 0.5).to(torch.int64)
        index = first + pixel[..., 1].clamp(0, h - 1) * w + pixel[..., 0].clamp(0, w - 1)
        samples = every.gather(2, index.flatten(1)[:, None].expand(-1, every.shape[1], -1))
        found.append(samples.unflatten(-1, index.shape[1:]))
        first = first + h * w
    return weighted(torch.cat(found, -1), attention_weights)


class Discrete(Levels):
    """The same with pixels in place of samples, value [B, S, M, D]."""

    def __init__(self):
        super().__init__()
        self.ms_deformable_attn_core = functools.partial(either_core, method="discrete")

    @staticmethod
    def example():
        query, pixels, points, _ = tensors()
        return query, points, pixels.unflatten(-1, (HEADS, -1)), SIZES


class Maps(Attention):
    """The layer of LibreYOLO's GTR."""

    def forward(self, query, reference_points, value, value_spatial_shapes):
        where, weights = self.where(query, reference_points)
        return maps_core(value, value_spatial_shapes, where, weights, [2, 2])

    @staticmethod
    def example():
        query, points, value, sizes = Levels.example()
        maps = [each.flatten(0, 1).unflatten(-1, size) for each, size in zip(value, sizes)]
        return query, points, maps, sizes


class Nameless(Attention):
    def forward(self, q, r, x, hw):
        where, weights = self.where(q, r)
        where, weights = where.unflatten(3, (LEVELS, POINTS)), weights.unflatten(3, (LEVELS, POINTS))
        return self.output_proj(
            nameless_core(self.value_proj(x).unflatten(-1, (HEADS, -1)), hw, where, weights)
        )


class ThreeOutputs(Attention):
    """The layer of ReferFormer and VNext: it also returns locations and weights, and calls a compiled op."""

    def forward(
        self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index=None
    ):
        where, weights = self.where(query, reference_points)
        where, weights = where.unflatten(3, (LEVELS, POINTS)), weights.unflatten(3, (LEVELS, POINTS))
        value = self.value_proj(input_flatten).unflatten(-1, (HEADS, -1))
        starts = input_spatial_shapes.prod(1).cumsum(0) - input_spatial_shapes.prod(1)
        output = MSDeformAttnFunction.apply(
            value, input_spatial_shapes, starts, where, weights, self.im2col_step
        )
        return self.output_proj(output), where, weights


class Temporal(Attention):
    """BEVFormer's layer: averages the results of two queued frames; one core for GPUs, one for CPUs."""

    def __init__(self):
        super().__init__(points=2 * LEVELS * POINTS, width=2 * WIDTH)
        self.dropout = nn.Dropout(0.0)

    def forward(self, query, key=None, value=None, reference_points=None, spatial_shapes=None, **kwargs):
        batch, identity = query.shape[0], query
        query = torch.cat([value[:batch], query], -1)
        where, weights = self.where(query, reference_points[:batch])
        where = where.unflatten(3, (2, LEVELS, POINTS)).permute(0, 3, 1, 2, 4, 5, 6).flatten(0, 1)
        weights = weights.unflatten(3, (2, LEVELS, POINTS)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        value = self.value_proj(value).unflatten(-1, (HEADS, -1))
        if torch.cuda.is_available() and value.is_cuda:
            function = MSDeformAttnFunction
            starts = spatial_shapes.prod(1).cumsum(0) - spatial_shapes.prod(1)
            output = function.apply(value, spatial_shapes, starts, where, weights, self.im2col_step)
        else:
            output = plain_core(value, spatial_shapes, where, weights)
        output = output.unflatten(0, (batch, 2)).mean(1)
        return self.dropout(self.output_proj(output)) + identity

    @staticmethod
    def example():
        query, pixels, points, shapes = tensors()
        query = torch.cat([query, query, query, query[:, :1]], 1)  # as many as there are pixels
        points = points.repeat(1, 4, 1, 1)[:, :PIXELS]
        return query, None, torch.stack([pixels, query], 1).flatten(0, 1), points, shapes


class Anchors(Attention):
    """BEVFormer's spatial cross attention: points at several heights for each query, no output projection."""

    def __init__(self):
        super().__init__()
        self.output_proj = None

    def forward(self, query, key=None, value=None, reference_points=None, spatial_shapes=None, **kwargs):
        value = self.value_proj(value).unflatten(-1, (HEADS, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, LEVELS, 1, POINTS, 2)).tanh()
        weights = self.attention_weights(query).unflatten(-1, (HEADS, -1)).softmax(-1)
        where = (reference_points[:, :, None, None, None] + 0.1 * offsets).flatten(4, 5)
        return plain_core(value, spatial_shapes, where, weights.unflatten(3, (LEVELS, POINTS)))

    @staticmethod
    def example():
        query, pixels, points, shapes = tensors()
        return query, None, pixels, points.repeat(1, 1, POINTS, 1), shapes


KINDS = (Flat, Channels, PairsToo, Levels, Discrete, Maps, Nameless, ThreeOutputs, Temporal, Anchors)
