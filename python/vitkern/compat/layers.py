# SPDX-License-Identifier: Apache-2.0
"""The forwards that replace those of other projects: same arguments by name, same results.

Each returns NotImplemented for cases that only the original forward handles: it then runs, and raises if needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.functional import ms_deform_attn, ms_deform_attn_fused

Layer = Any  # a module of another project
Shapes = Tensor | Sequence[tuple[int, int]]  # of levels, as (height, width)

# The sampling of RT-DETR v2 and its kin, and what it is called here.
METHODS = {"default": "bilinear", "discrete": "nearest"}

# The value of a function that samples: [B, S, M, D]; [B, M, D, S]; a list of levels, [B, M, D, S_l] each; or a list
# of maps, [B * M, D, H, W] each.
LAYOUTS = ("pixels", "channels", "levels", "maps")


def transformers(
    padding: bool,  # whether True in the mask is padding
    layer: Layer,
    hidden_states: Any = None,  # [B, Q, C]
    attention_mask: Tensor | None = None,  # [B, S]
    encoder_hidden_states: Any = None,  # [B, S, C]
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    **_: Any,
) -> Any:
    """The layer of transformers. It runs softmax once more than needed, since it returns the weights, used or not."""
    shapes = _shapes(spatial_shapes_list, spatial_shapes)
    if shapes is None or not _are_reference_points(reference_points):
        return NotImplemented
    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    value = layer.value_proj(encoder_hidden_states)
    if attention_mask is not None:
        value = value.masked_fill((attention_mask if padding else ~attention_mask)[..., None], 0.0)
    sizes = (layer.n_heads, layer.n_levels, layer.n_points)
    output, logits = _attend(layer, hidden_states, value, (shapes, None), reference_points, sizes)
    return layer.output_proj(output), logits.softmax(-1).view(*logits.shape[:-1], *sizes[1:])


def transformers_v2(
    layer: Layer,
    hidden_states: Any = None,  # [B, Q, C]
    attention_mask: Tensor | None = None,  # [B, S], True where the value is valid
    encoder_hidden_states: Any = None,  # [B, S, C]
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,  # [B, Q, 1, 4]
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    **_: Any,
) -> Any:
    """RT-DETR v2, D-FINE and DEIM v2. Not fused: the factor of the offsets is in a buffer that checkpoints contain."""
    v2 = hasattr(layer, "n_points_list")
    points = layer.n_points_list if v2 else layer.num_points_list
    reach = layer.n_points_scale if v2 else layer.num_points_scale
    method = layer.method if v2 else layer.decoder_method
    shapes = _shapes(spatial_shapes_list, spatial_shapes)
    if shapes is None or method not in METHODS or not _are_reference_points(reference_points, (4,)):
        return NotImplemented
    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    value = layer.value_proj(encoder_hidden_states) if v2 else encoder_hidden_states
    if attention_mask is not None:
        value = value.masked_fill(~attention_mask[..., None], 0.0)
    offsets = layer.sampling_offsets(hidden_states).unflatten(-1, (layer.n_heads, sum(points), 2))
    weights = layer.attention_weights(hidden_states).unflatten(-1, (layer.n_heads, sum(points))).softmax(-1)
    boxes = reference_points[:, :, None]
    reach = reach.to(hidden_states.dtype)[:, None]
    locations = boxes[..., :2] + offsets * reach * boxes[..., 2:] * layer.offset_scale
    output = core_v2(value.unflatten(-1, (layer.n_heads, -1)), shapes, locations, weights, points, method)
    return layer.output_proj(output) if v2 else output, weights


def deformable_detr(
    layer: Layer,
    query: Any = None,  # [B, Q, C]
    reference_points: Any = None,
    input_flatten: Any = None,  # [B, S, C]
    input_spatial_shapes: Any = None,
    input_level_start_index: Tensor | None = None,
    input_padding_mask: Tensor | None = None,  # [B, S], True where the input is padding
    input_spatial_shapes_hw: Any = None,  # the same sizes as pairs, in RF-DETR
    **unknown: Any,
) -> Any:
    if unknown or input_spatial_shapes is None or not _are_reference_points(reference_points):
        return NotImplemented
    value = layer.value_proj(input_flatten)
    if input_padding_mask is not None:
        value = value.masked_fill(input_padding_mask[..., None], 0.0)
    sizes = (layer.n_heads, layer.n_levels, layer.n_points)
    levels = (_shapes(input_spatial_shapes_hw, input_spatial_shapes), input_level_start_index)
    output, _ = _attend(layer, query, value, levels, reference_points, sizes)
    return layer.output_proj(output)


def of_values(
    valid: bool,  # whether the mask is multiplied, True where the value is valid
    layer: Layer,
    query: Any = None,  # [B, Q, C]
    reference_points: Any = None,
    value: Any = None,  # [B, S, C]
    value_spatial_shapes: Any = None,
    value_mask: Tensor | None = None,  # [B, S]
    **others: Any,
) -> Any:
    """ultralytics, and the first RT-DETR: arguments of other names, sizes as pairs."""
    points = others.pop("refer_bbox", reference_points)
    shapes = others.pop("value_shapes", value_spatial_shapes)
    if others or shapes is None or not _are_reference_points(points):
        return NotImplemented
    value = layer.value_proj(value)
    if value_mask is not None:
        mask = value_mask[..., None]
        value = value * mask.to(value.dtype) if valid else value.masked_fill(mask, 0.0)
    heads = layer.num_heads if valid else layer.n_heads
    levels, count = (layer.num_levels, layer.num_points) if valid else (layer.n_levels, layer.n_points)
    output, _ = _attend(layer, query, value, (shapes, None), points, (heads, levels, count))
    return layer.output_proj(output)


def mmcv(
    adds: bool,  # whether the identity is added to the result, after dropout
    layer: Layer,
    query: Any = None,  # [Q, B, C], or [B, Q, C] with batch_first
    key: Tensor | None = None,
    value: Any = None,  # [S, B, C] or [B, S, C]
    identity: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,  # [B, S], True where value is padding
    reference_points: Any = None,
    spatial_shapes: Any = None,
    level_start_index: Tensor | None = None,
    **others: Any,
) -> Any:
    deprecated = "residual" in others  # mmcv's earlier name for identity
    if query is None or spatial_shapes is None or deprecated or not _are_reference_points(reference_points):
        return NotImplemented
    inputs = (query, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index)
    output = attend_as_mmcv(layer, *inputs)
    return layer.dropout(output) + (query if identity is None else identity) if adds else output


def core(
    layer: Layer,
    value: Tensor,
    value_spatial_shapes: Shapes,
    value_spatial_shapes_list: Shapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The core of most layers of transformers, a layer of its own."""
    shapes = _shapes(value_spatial_shapes_list, value_spatial_shapes)
    with _no_autocast(value.device.type):
        value = _widened(value, sampling_locations)
        return ms_deform_attn(value, shapes, None, sampling_locations, attention_weights)


def sampling(
    names: Mapping[str, str],  # of the arguments, by role
    method: str,
    layer: Layer,
    **given: Any,
) -> Any:
    """A function of another project that samples, for any names of its arguments."""
    roles = ("value", "shapes", "shapes_list", "locations", "weights", "points_list")
    found: list[Any] = [given.get(names.get(role, "")) for role in roles]
    value, shapes, listed, where, weights, counts = found
    shapes = _shapes(listed, shapes)
    if not all(isinstance(each, Tensor) for each in (value, where, weights)) or not _are_shapes(shapes):
        return NotImplemented
    if counts is None:
        where, weights = _by_level(where, len(shapes), 6), _by_level(weights, len(shapes), 5)
    elif not isinstance(counts, (list, tuple)) or not all(type(each) is int for each in counts):
        return NotImplemented
    axes = 4 if counts is not None else 5  # of weights
    if value.dim() != 4 or where.dim() != axes + 1 or weights.dim() != axes or method not in METHODS:
        return NotImplemented
    autocast = torch.is_autocast_enabled(value.device.type)
    wide = torch.promote_types(value.dtype, where.dtype)
    if where.dtype != wide or (wide != torch.float32 if autocast else {value.dtype, weights.dtype} != {wide}):
        return NotImplemented  # grid_sample refuses these, or rounds in ways that no trial has covered
    if method == "discrete":  # no gradient at all
        where = where.detach()
    inputs = value.to(wide), shapes, None, where, weights.to(wide)
    with _no_autocast(value.device.type):
        return ms_deform_attn(*inputs, points_per_level=counts, method=METHODS[method])


def as_pixels(value: Any, layout: str, heads: int) -> Any:
    """The value [B, S, M, D], or None if it has another layout than the one that was tried."""
    if layout in ("levels", "maps"):
        is_list = isinstance(value, (list, tuple))
        if not is_list or not all(isinstance(each, Tensor) and each.dim() == 4 for each in value):
            return None
        if layout == "maps":
            value = [each.flatten(2).unflatten(0, (-1, heads)) for each in value]
        value = torch.cat(list(value), -1)
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    return value if layout == "pixels" else value.permute(0, 3, 1, 2)


def _by_level(tensor: Any, levels: int, axes: int) -> Any:
    """Locations or weights with an axis for levels and one for points, which may have been one."""
    if isinstance(tensor, Tensor) and tensor.dim() == axes - 1 and tensor.shape[3] % levels == 0:
        return tensor.unflatten(3, (levels, tensor.shape[3] // levels))
    return tensor


def _are_shapes(given: Any) -> bool:
    if isinstance(given, Tensor):
        return given.dim() == 2 and not given.is_floating_point()
    pairs = isinstance(given, (list, tuple)) and all(isinstance(each, (list, tuple)) for each in given)
    return pairs and all(len(each) == 2 and all(isinstance(n, int) for n in each) for each in given)


def core_v2(
    value: Tensor,  # [B, S, M, D]
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,  # [B, Q, M, K, 2]
    attention_weights: Tensor,  # [B, Q, M, K]
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """The core of RT-DETR v2, whose levels may have different numbers of points."""
    if method == "discrete":  # no gradient at all: an optimizer would also decay what receives zeros
        sampling_locations = sampling_locations.detach()
    with _no_autocast(value.device.type):
        inputs = (
            _widened(value, attention_weights),
            value_spatial_shapes,
            None,
            sampling_locations,
            attention_weights,
        )
        return ms_deform_attn(*inputs, points_per_level=num_points_list, method=METHODS[method])


def attend_as_mmcv(
    layer: Layer,  # mmcv's, detrex's, GroundingDINO's, or one of this package
    query: Tensor,  # [Q, B, C]; [B, Q, C] if layer.batch_first, and so with value and query_pos
    value: Tensor | None,  # [S, B, C]
    query_pos: Tensor | None,  # [Q, B, C]
    key_padding_mask: Tensor | None,  # [B, S], True where the value is padding
    reference_points: Any,  # [B, Q, L, 2 | 4]
    spatial_shapes: Any,  # [L, 2]
    level_start_index: Tensor | None,  # [L]
) -> Tensor:  # [Q, B, C]
    """The common part of the layers of mmcv, detrex and GroundingDINO: all except dropout and the identity."""
    value = query if value is None else value
    if query_pos is not None:
        query = query + query_pos
    if not layer.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    value = layer.value_proj(value)
    if key_padding_mask is not None:
        value = value.masked_fill(key_padding_mask[..., None], 0.0)
    sizes = (layer.num_heads, layer.num_levels, layer.num_points)
    output, _ = _attend(layer, query, value, (spatial_shapes, level_start_index), reference_points, sizes)
    output = layer.output_proj(output)
    return output if layer.batch_first else output.transpose(0, 1)


def _attend(
    layer: Layer,
    query: Tensor,  # [B, Q, C]
    value: Tensor,  # [B, S, M * D]
    levels: tuple[Shapes, Any],  # shapes, and first pixels or None
    reference_points: Tensor,  # [B | 1, Q, L | 1, 2 | 4]
    sizes: tuple[int, int, int],  # M, L, P
) -> tuple[Tensor, Tensor]:  # [B, Q, M * D], and the logits [B, Q, M, L * P]
    heads, *points = sizes
    offsets = layer.sampling_offsets(query).unflatten(-1, (*sizes, 2))
    logits = layer.attention_weights(query).unflatten(-1, (heads, math.prod(points)))
    value = value.unflatten(-1, (heads, -1))
    return ms_deform_attn_fused(value, *levels, reference_points, offsets, logits), logits


def _no_autocast(device: str) -> torch.autocast:
    """A context without autocast, as cores that call grid_sample return float32 under autocast too."""
    return torch.autocast(device, enabled=False)


def _widened(value: Tensor, other: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, other.dtype))


def _are_reference_points(given: Any, last: tuple[int, ...] = (2, 4)) -> bool:
    return isinstance(given, Tensor) and given.dim() == 4 and given.shape[-1] in last


def _shapes(listed: Any, tensor: Any) -> Any:
    """The levels, as pairs or a tensor. Pairs are faster, but a graph would fix them; a tensor allows other sizes."""
    if listed is None or (tensor is not None and torch.compiler.is_compiling()):
        return tensor
    return listed
