# SPDX-License-Identifier: Apache-2.0
"""ms_deform_attn and ms_deform_attn_fused as standard ONNX operators, one GridSample a level, or TensorRT's plugin.

Equation numbers are those of ``docs/derivations/ms_deform_attn.md``. Sums are in float32 (float64 for float64), as in
the kernels. Spatial shapes may be constants, which the exporter's optimizer folds, or inputs of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from vitkern.onnx.graph import DOUBLE, FLOAT, INT32, INT64, Graph, Value, refuse

_OUTSIDE = 3.0  # beyond 1 + 1 / size, outside of every level: -1 and 1 are the edges in grid coordinates
_LARGEST = 3.4028234663852886e38  # float32 number


class Sampling(NamedTuple):
    """The inputs of the plain form, to which both forms of the op are reduced."""

    op: str
    value: Value  # [B, S, M, D]
    shapes: Value  # [L, 2] as (height, width)
    starts: Value  # [L]
    locations: Value  # [B, Q, M, K, 2] as (x, y), in the dtype of the sums
    weights: Value  # [B, Q, M, K]
    queries: int | None  # Q, None where it is dynamic
    points: tuple[int, ...]  # of each level, K in all
    method: str


def ms_deform_attn(
    graph: Graph,
    value: Value,
    spatial_shapes: Value,
    level_start_index: Value,
    sampling_locations: Value,
    attention_weights: Value,
    points_per_level: Sequence[int] | None = None,
    method: str = "bilinear",
    backend: str | None = None,
) -> Sampling:
    """The sampling of vitkern::ms_deform_attn."""
    op, heads, queries = "ms_deform_attn", graph.sizes(value)[2], graph.sizes(sampling_locations)[1]
    points = _points(graph, op, spatial_shapes, sampling_locations, points_per_level)
    locations = _widened(graph, sampling_locations, value)
    weights = _widened(graph, attention_weights, value)
    if points_per_level is None:
        locations = graph.Reshape(locations, [-1, 0, heads, sum(points), 2])
        weights = graph.Reshape(weights, [-1, 0, heads, sum(points)])
    levels = spatial_shapes, level_start_index
    return Sampling(op, value, *levels, locations, weights, queries, points, method)


def ms_deform_attn_fused(
    graph: Graph,
    value: Value,
    spatial_shapes: Value,
    level_start_index: Value,
    reference_points: Value,
    sampling_offsets: Value,
    attention_logits: Value,
    points_per_level: Sequence[int] | None = None,
    method: str = "bilinear",
    backend: str | None = None,
) -> Sampling:
    """The sampling of vitkern::ms_deform_attn_fused: computes softmax and locations, eqs. (8) to (10)."""
    op, heads, queries = "ms_deform_attn_fused", graph.sizes(value)[2], graph.sizes(sampling_offsets)[1]
    points = _points(graph, op, spatial_shapes, sampling_offsets, points_per_level)
    weights = graph.Softmax(_widened(graph, attention_logits, value), axis=-1)
    offsets = _widened(graph, sampling_offsets, value)
    if points_per_level is None:
        offsets = graph.Reshape(offsets, [-1, 0, heads, sum(points), 2])

    _, _, shared, numbers = graph.sizes(reference_points)
    reference = _widened(graph, reference_points, value)  # [B | 1, Q, L | 1, 2 | 4]
    if shared != 1:
        reference = graph.Gather(reference, _level_of_each(points), axis=2)
    reference = graph.Unsqueeze(reference, [2])  # [B | 1, Q, 1, K | 1, 2 | 4]
    if numbers == 2:
        places = reference
        moves = graph.Div(offsets, _sizes(graph, spatial_shapes, points, value))
    else:
        places = graph.Slice(reference, [0], [2], [4])
        box = graph.Slice(reference, [2], [4], [4])
        shares = [[0.5 / count] for count in points for _ in range(count)]
        moves = graph.Mul(offsets, graph.Mul(box, graph.constant(shares, _wide(graph, value))))
    levels = spatial_shapes, level_start_index
    return Sampling(op, value, *levels, graph.Add(places, moves), weights, queries, points, method)


def by_grid_sample(graph: Graph, sampling: Sampling) -> Value:  # [B, Q, M * D]
    """The sum over the points of weight times sample, eq. (1), in standard operators."""
    op, value, shapes, starts, _, weights, _, points, method = sampling
    heads, channels = _heads(graph, op, value)
    total, queries = sum(points), _queries(graph, sampling)

    grid = graph.Transpose(_grid(graph, sampling), perm=[0, 2, 1, 3, 4])
    grid = graph.Reshape(grid, _join(graph, [-1], queries, [total, 2]))  # [B * M, Q, K, 2]
    pixels = graph.Transpose(_widened(graph, value, value), perm=[0, 2, 3, 1])  # [B, M, D, S]
    mode = graph.bilinear if method == "bilinear" else "nearest"

    samples = []
    for level, (last, count) in enumerate(zip(accumulate(points), points)):
        if count == 0:
            continue
        size = graph.Gather(shapes, level, axis=0)  # [2]
        image, there = pixels, grid
        if len(points) > 1:
            start = graph.Gather(starts, [level], axis=0)
            height, width = (graph.Gather(size, [axis], axis=0) for axis in (0, 1))
            end = graph.Add(start, graph.Mul(height, width))
            image = graph.Slice(pixels, start, end, [3])
            there = graph.Slice(grid, [last - count], [last], [2])
        image = graph.Reshape(image, _join(graph, [-1, channels], size))  # [B * M, D, H, W]
        samples.append(graph.GridSample(image, there, mode=mode, padding_mode="zeros", align_corners=0))

    every = samples[0] if len(samples) == 1 else graph.Concat(*samples, axis=3)  # [B * M, D, Q, K]
    weights = graph.Transpose(weights, perm=[0, 2, 1, 3])
    weights = graph.Reshape(weights, _join(graph, [-1, 1], queries, [total]))
    output = graph.ReduceSum(graph.Mul(every, weights), [3], keepdims=0)  # [B * M, D, Q]
    output = graph.Transpose(graph.Reshape(output, [-1, heads * channels, 0]), perm=[0, 2, 1])
    return _narrowed(graph, output, value)


def by_tensorrt(graph: Graph, sampling: Sampling, version: str) -> Value:  # [B, Q, M * D]
    """One node of TensorRT's plugin, which gives [B, Q, M, D].

    It takes locations and weights in value's dtype only. 16 bits cannot address a pixel of a wide map: all are float32.
    """
    op, value, shapes, starts, locations, weights, _, points, method = sampling
    if method != "bilinear":
        refuse(op, f"TensorRT's plugin has no method={method!r}; the standard operators have")
    if len(set(points)) > 1:
        refuse(
            op, f"TensorRT's plugin takes as many points on each level, got points_per_level={list(points)}"
        )
    if graph.dtype(value) == DOUBLE:
        refuse(op, "TensorRT's plugin has no float64; convert the model to float32")
    heads, channels = _heads(graph, op, value)
    levels = len(points)
    output = graph.plugin(
        version,
        _widened(graph, value, value),
        graph.Cast(shapes, to=INT32),
        graph.Cast(starts, to=INT32),
        graph.Reshape(locations, [-1, 0, heads, levels, points[0], 2]),
        graph.Reshape(weights, [-1, 0, heads, levels, points[0]]),
    )
    return _narrowed(graph, graph.Reshape(output, [-1, 0, heads * channels]), value)


def _grid(graph: Graph, sampling: Sampling) -> Value:
    """GridSample's coordinates [B, Q, M, K, 2]; outside of all levels for a location that adds nothing.

    GridSample casts coordinates to integers, and the result for numbers out of their range is undefined.
    """
    wide, locations = _wide(graph, sampling.value), sampling.locations
    half, one, two, outside = (graph.constant(number, wide) for number in (0.5, 1.0, 2.0, _OUTSIDE))
    if sampling.method == "bilinear":
        grid = graph.Sub(graph.Mul(locations, two), one)
        # Every comparison with NaN is false.
        return graph.Where(graph.Less(graph.Abs(grid), outside), grid, outside)
    # The centre of pixel floor(location * size + 0.5), clamped to the level, eq. (4).
    sizes = _sizes(graph, sampling.shapes, sampling.points, sampling.value)
    places = graph.Add(graph.Mul(locations, sizes), half)
    finite = graph.LessOrEqual(graph.Abs(places), graph.constant(_LARGEST, wide))
    pixel = graph.Floor(graph.Where(finite, places, one))
    pixel = graph.Min(graph.Max(pixel, graph.constant(0.0, wide)), graph.Sub(sizes, one))
    grid = graph.Sub(graph.Div(graph.Add(graph.Mul(pixel, two), one), sizes), one)
    return graph.Where(finite, grid, outside)


def _points(
    graph: Graph, op: str, shapes: Value, locations: Value, points_per_level: Sequence[int] | None
) -> tuple[int, ...]:
    """The number of points of each level."""
    levels, sizes = graph.sizes(shapes)[0], graph.sizes(locations)
    if levels is None or None in sizes[2:]:
        refuse(op, f"the numbers of heads, levels and points must be fixed, got locations of {sizes}")
    points = (sizes[4],) * levels if points_per_level is None else tuple(points_per_level)
    if not any(points):
        refuse(op, "there are no points to sample")
    return points  # type: ignore[return-value]


def _queries(graph: Graph, sampling: Sampling) -> Value:
    """The number of queries; read from the shape when the model runs if it is dynamic."""
    return graph.Shape(sampling.weights, start=1, end=2) if sampling.queries is None else [sampling.queries]


def _join(graph: Graph, *parts: Value) -> Value:
    """A shape from known and computed numbers."""
    if all(isinstance(part, list) for part in parts):
        return [size for part in parts for size in part]
    known = (graph.constant(part, INT64) if isinstance(part, list) else part for part in parts)
    return graph.Concat(*known, axis=0)


def _heads(graph: Graph, op: str, value: Value) -> tuple[int, int]:
    """The number of heads and the channels of each."""
    heads, channels = graph.sizes(value)[2:]
    if heads is None or channels is None:
        refuse(op, f"the numbers of heads and channels must be fixed, got value of {graph.sizes(value)}")
    return heads, channels


def _level_of_each(points: tuple[int, ...]) -> list[int]:
    """The level of each of the K points."""
    return [level for level, count in enumerate(points) for _ in range(count)]


def _sizes(graph: Graph, shapes: Value, points: tuple[int, ...], like: Value) -> Value:
    """The (width, height) of each point's level, [K, 2], or [1, 2] for a single level."""
    sizes = graph.Cast(graph.Gather(shapes, [1, 0], axis=1), to=_wide(graph, like))
    return sizes if len(points) == 1 else graph.Gather(sizes, _level_of_each(points), axis=0)


def _wide(graph: Graph, value: Value) -> int:
    """The dtype of sums."""
    return DOUBLE if graph.dtype(value) == DOUBLE else FLOAT


def _widened(graph: Graph, tensor: Value, like: Value) -> Value:
    wide = _wide(graph, like)
    return tensor if graph.dtype(tensor) == wide else graph.Cast(tensor, to=wide)


def _narrowed(graph: Graph, output: Value, like: Value) -> Value:
    dtype = graph.dtype(like)
    return output if dtype == _wide(graph, like) else graph.Cast(output, to=dtype)
