# SPDX-License-Identifier: Apache-2.0
"""Draws the arguments of each op."""

from __future__ import annotations

import numpy as np
import torch

from tools.fuzzing.draw import TORCH, Case, Draw

_ACTIVATIONS = ("relu", "gelu", "silu")


def _dense(draw: Draw) -> tuple[int, int]:
    """The largest number of rows or pixels, and of channels: small, with sometimes one of them large."""
    backend = draw.case.backend
    many = float(draw.rng.random())
    if many < 0.04:  # more than kernels take at once
        return {"triton": (2, 90), "cuda": (4, 280)}.get(backend, (6, 600))
    if many < 0.12:
        return {"triton": (5, 20), "cuda": (70, 20)}.get(backend, (400, 40))
    return {"triton": (5, 20), "cuda": (9, 40)}.get(backend, (24, 70))


def _images(draw: Draw) -> int:
    """The largest number of images; Triton's interpreter takes a tenth of a second for the program of each image."""
    return 2 if draw.case.backend == "triton" else 3


def _tokens(most: int) -> int:
    """The largest number of tokens with this many channels: as many as fit the shared memory of every card."""
    return 128 if most > 100 else min(most, 20)


def adapter_bottleneck(draw: Draw) -> Case:
    case, (rows, most) = draw.case, _dense(draw)
    channels, hidden = draw.size(most), draw.size(most // 2, empty=0.0)
    leading: tuple[int, ...] = (draw.size(rows),)
    if draw.chance(0.4):
        leading = () if draw.chance(0.25) else (draw.size(3), draw.size(max(rows // 3, 1)))
    shape = (*leading, channels)
    draw.tensor("x", shape, case.dtype)
    other = draw.other_dtype(0.15)
    draw.tensor("down_weight", (hidden, channels), other)
    case.tensors["down_bias"] = None
    if draw.chance(0.7):
        draw.tensor("down_bias", (hidden,), other)
    draw.tensor("up_weight", (channels, hidden), other)
    case.tensors["up_bias"] = None
    if draw.chance(0.7):
        draw.tensor("up_bias", (channels,), draw.other_dtype(0.1))
    residual, dtype = draw.one_of(("none", "x", "other")), case.dtype
    case.residual_is_x = residual == "x"
    case.tensors["residual"] = None
    if residual == "other":
        kind = draw.other_dtype(0.2)
        draw.tensor("residual", shape, kind)
        dtype = str(torch.promote_types(TORCH[case.dtype], TORCH[kind])).removeprefix("torch.")
    case.tensors["scale"] = None
    case.options = {"activation": draw.one_of(_ACTIVATIONS)}
    if draw.chance(0.5):
        draw.tensor("scale", draw.one_of(((), (1,), (1, 1))), draw.other_dtype())
    elif draw.chance(0.7):
        case.options["scale"] = float(draw.one_of((0.1, 0.0, -2.5, 1, float(draw.rng.normal()))))
    if draw.chance(0.4):
        p = float(draw.one_of((0.0, 0.1, 0.5, 0.9, 1.0, 1e-9)))
        case.options |= {"dropout_p": p, "training": draw.chance(0.8)}
    return draw.finish(shape, dtype)


def token_pool(draw: Draw) -> Case:
    case, (pixels, most) = draw.case, _dense(draw)
    batch, count, channels = draw.size(_images(draw)), draw.size(pixels), draw.size(most)
    tokens = draw.size(_tokens(most))
    draw.tensor("x", (batch, count, channels), case.dtype)
    shape = (tokens, channels) if draw.chance(0.5) else (batch, tokens, channels)
    draw.tensor("weight", shape, draw.other_dtype(0.15))
    if draw.chance(0.15):
        case.options["return_attention"] = True
    return draw.finish((batch, tokens, channels), case.dtype)


def token_project(draw: Draw) -> Case:
    case, (pixels, most) = draw.case, _dense(draw)
    batch, count, channels = draw.size(_images(draw)), draw.size(pixels), draw.size(most)
    tokens, keys = draw.size(_tokens(most)), draw.size(most)
    draw.tensor("x", (batch, count, channels), case.dtype)
    draw.tensor("query", (batch, count, keys), case.dtype)
    draw.tensor("key", (batch, tokens, keys), case.dtype)
    draw.tensor("tokens", (batch, tokens, channels), case.dtype)
    return draw.finish((batch, count, channels), case.dtype)


def _pyramid(draw: Draw) -> tuple[list[int], list[int]]:
    """Draws the levels of the case; returns the points of each level and the last axes, [L, P], or [K] if ragged."""
    case = draw.case
    count = draw.size({"triton": 2, "cuda": 3}.get(case.backend, 4), empty=0.03)
    side = 5 if case.small else 9
    case.levels = [(draw.size(side, empty=0.04), draw.size(side, empty=0.04)) for _ in range(count)]
    order = draw.rng.permutation(count) if draw.chance(0.3) else np.arange(count)
    case.starts, first = [0] * count, 0
    for level in order:
        case.starts[level], first = first, first + case.levels[level][0] * case.levels[level][1]
    ragged = draw.chance(0.3)
    if ragged:
        case.options["points_per_level"] = points = [
            draw.size(2 if case.backend == "triton" else 3, empty=0.2) for _ in range(count)
        ]
        return points, [sum(points)]
    each = draw.size({"triton": 2, "cuda": 3}.get(case.backend, 5), empty=0.03)
    return [each] * count, [count, each]


def _tables(draw: Draw) -> None:
    """Draws the form of the levels: pairs or a tensor; first pixels as numbers, a tensor or, if possible, None."""
    case = draw.case
    shapes: object = list(case.levels)
    if draw.chance(0.6) or not case.levels:
        kind = torch.int64 if draw.chance(0.8) else torch.int32
        table = torch.tensor(case.levels, dtype=kind).reshape(-1, 2)
        shapes = case.places.place(table, "permuted" if draw.chance(0.3) else "plain")
    follow = case.starts == [sum(h * w for h, w in case.levels[:i]) for i in range(len(case.levels))]
    starts: object = None if follow and draw.chance(0.5) else list(case.starts)
    if starts is not None and draw.chance(0.7):
        starts = case.places.place(torch.tensor(case.starts, dtype=torch.int64), "plain")
    case.tables = shapes, starts


def _attention(draw: Draw) -> tuple[tuple[int, ...], list[int], list[int]]:
    """Draws value and the levels; returns (B, Q, M, D), the points of each level, and the last axes of the points."""
    case = draw.case
    points, layout = _pyramid(draw)
    _tables(draw)
    queries = draw.size({"triton": 3, "cuda": 5}.get(case.backend, 12))
    if draw.chance(0.04) and not case.small:
        queries = 70
    most = (2, 1 + draw.chance(0.2)) if case.backend == "triton" else (3, 2)
    heads, batch = draw.size(most[0]), draw.size(most[1])
    channels, pixels = draw.size(34 if case.small else 40), sum(h * w for h, w in case.levels)
    draw.tensor("value", (batch, pixels, heads, channels), case.dtype)
    case.options["method"] = "bilinear" if draw.chance(0.7) else "nearest"
    return (batch, queries, heads, channels), points, layout


def _sizes_of_points(case: Case, points: list[int]) -> np.ndarray:
    """The (width, height) of each point's level, [K, 2]."""
    sizes = np.array(case.levels, dtype=np.float64).reshape(-1, 2)[:, ::-1]
    return np.repeat(sizes, points, 0)


def _pixels(draw: Draw, shape: tuple[int, ...], sizes: np.ndarray) -> np.ndarray:
    """Coordinates in pixels [..., K, 2]: anywhere in and around the maps, on centres and edges, or beside these."""
    anywhere = draw.rng.uniform(-1.5, 1.5, shape) + draw.rng.random(shape) * sizes
    halves = np.round(2 * anywhere) / 2
    kind = draw.rng.random(shape)
    edges = 0.0 if draw.chance(0.4) else 0.4
    chosen = np.where(kind < edges, halves, anywhere)
    step = np.where(draw.rng.random(shape) < 0.5, np.inf, -np.inf).astype(np.float32)
    beside = np.nextafter(halves.astype(np.float32), step)
    return np.where(kind < edges / 3, beside, chosen)


def _mostly_finite(draw: Draw, data: np.ndarray) -> np.ndarray:
    if not draw.ordinary and draw.chance(0.4):
        draw.spoil(data)
        if data.size and draw.chance(0.5):
            data.reshape(-1)[draw.rng.integers(data.size)] = draw.one_of((6e4, -6e4))
    return data


def ms_deform_attn(draw: Draw) -> Case:
    case = draw.case
    (batch, queries, heads, channels), points, layout = _attention(draw)
    shape = (batch, queries, heads, sum(points), 2)
    sizes = _sizes_of_points(case, points)
    locations = _mostly_finite(draw, _pixels(draw, shape, sizes) / np.maximum(sizes, 1))
    of_locations, of_weights = draw.other_dtype(), draw.other_dtype()
    data = torch.from_numpy(locations).to(TORCH[of_locations])
    case.tensors["locations"] = draw.placed(data.reshape(*shape[:3], *layout, 2))
    draw.tensor("weights", (*shape[:3], *layout), of_weights)
    return draw.finish((batch, queries, heads * channels), case.dtype)


def ms_deform_attn_fused(draw: Draw) -> Case:
    case = draw.case
    (batch, queries, heads, channels), points, layout = _attention(draw)
    shape = (batch, queries, heads, sum(points), 2)
    levels, boxes = len(case.levels), draw.chance(0.4)
    of_reference = (draw.one_of((1, batch)), queries, draw.one_of((1, levels)), 4 if boxes else 2)
    where = draw.rng.uniform(-0.1, 1.1, of_reference)
    if draw.chance(0.3):
        where = np.round(where * 4) / 4
    if not draw.ordinary and draw.chance(0.2):
        draw.spoil(where)
    dtypes = [draw.other_dtype() for _ in range(3)]
    case.tensors["reference_points"] = draw.placed(torch.from_numpy(where).to(TORCH[dtypes[0]]))
    if boxes:
        offsets = 3 * draw.rng.standard_normal(shape)
    else:
        centre = np.repeat(np.broadcast_to(where, (*of_reference[:2], levels, 2)), points, 2)[:, :, None]
        sizes = _sizes_of_points(case, points)
        with np.errstate(all="ignore"):
            offsets = np.nan_to_num(_pixels(draw, shape, sizes) - centre * sizes, posinf=0, neginf=0)
    offsets = _mostly_finite(draw, offsets)
    data = torch.from_numpy(offsets).to(TORCH[dtypes[1]])
    case.tensors["offsets"] = draw.placed(data.reshape(*shape[:3], *layout, 2))
    draw.tensor("logits", shape[:4], dtypes[2])
    return draw.finish((batch, queries, heads * channels), case.dtype)


DRAWN = {
    "ms_deform_attn": ms_deform_attn,
    "ms_deform_attn_fused": ms_deform_attn_fused,
    "adapter_bottleneck": adapter_bottleneck,
    "token_pool": token_pool,
    "token_project": token_project,
}
