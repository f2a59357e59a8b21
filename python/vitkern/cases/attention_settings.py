# SPDX-License-Identifier: Apache-2.0
"""The records of multi-scale deformable attention, plain and fused: the inputs that break kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitkern.cases.attention import ATTENTION_CASES, MsDeformAttnCase
from vitkern.cases.attention_ops import FORMS, ms_deform_attn, ms_deform_attn_fused
from vitkern.cases.record import (
    Op,
    Problem,
    Setting,
    by_name,
    every_other,
    first_of_all,
    one_number,
    shrunk,
    with_nan,
)

NAN, INF = float("nan"), float("inf")
SMALL = MsDeformAttnCase("small", "", 2, ((5, 7), (3, 4), (2, 1)), 9, 3, 32, 5)
TINY = MsDeformAttnCase("tiny", "", 1, ((4, 3), (2, 2)), 2, 2, 3, 2)
_FAR = (1e30, -1e30, 3e37, -7.0, 1e9)


def small(**changes: Any) -> MsDeformAttnCase:
    return replace(SMALL, **changes)


def _in_input(name: str, change: Callable[[Tensor], None]) -> Callable[[Problem], None]:
    return lambda problem: change(problem.inputs[name])


def _not_finite(places: Tensor) -> None:
    bad = torch.tensor([NAN, INF, -INF, NAN, -INF], dtype=torch.float64, device=places.device)
    places[:, 1, :, :, :, 0] = bad
    places[:, 2, :, :, :, 1] = bad


def _far_outside(places: Tensor) -> None:
    places[:, 3, :, :, :, 0] = torch.tensor(_FAR, dtype=torch.float64, device=places.device)
    places[:, 4] = -7.0


def _denormal(places: Tensor) -> None:
    places[:, 5, :, :, 2] = torch.tensor([1e-42, -1e-42], dtype=torch.float64, device=places.device)


def _nan_pixels(value: Tensor) -> None:
    """Sets corners and the middle to NaN, each of another head, next to pixels of another level."""
    heads = value.shape[2]
    for head, pixel in enumerate((0, 17, 34, -1)):
        value[:, pixel, head % heads] = NAN


def _edges(locations: Tensor) -> None:
    """Moves locations exactly to edges and centres of pixels in maps of 2^n pixels, and outside of the maps."""
    exact = torch.tensor([0.0, 1.0, -0.125, 0.125, 0.5, 0.375, 1.125, 0.875], dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(exact, exact, indexing="ij"), -1).flatten().to(locations.device)
    locations.copy_(grid.repeat(locations.numel() // len(grid) + 1)[: locations.numel()].view_as(locations))


def _empty_level(size: tuple[int, int], start: int, at: int) -> Callable[[Problem], None]:
    """Sets the size and first pixel of an empty level, and some of its attention weights to NaN."""

    def alter(problem: Problem) -> None:
        shapes, starts = problem.tables
        shapes[at], starts[at] = torch.tensor(size), start
        if "weights" in problem.inputs:
            problem.inputs["weights"][:, 0, :, at] = NAN

    return alter


def _extreme(logits: Tensor) -> None:
    logits[:, 0] *= 1e4
    logits[:, 1, :, ::2] = -INF
    logits[:, 2] = 88.0
    logits[:, 3] = -1e30


def _nan_logit(logits: Tensor) -> None:
    logits[:, 0, 0, 1] = NAN


def _nowhere(bad: float) -> Callable[[Problem], None]:
    """Sets sizes of boxes and offsets to `bad`: they are factors in gradients, eq. (12), and 0 * inf is NaN."""

    def alter(problem: Problem) -> None:
        boxes, offsets = problem.inputs["reference_points"], problem.inputs["offsets"]
        boxes[:, 0, :, 2], boxes[:, 1, :, 3], offsets[:, 2] = bad, bad, bad

    return alter


EMPTY: dict[str, dict[str, Any]] = {
    "no-batch": {"batch": 0},
    "no-queries": {"queries": 0},
    "no-heads": {"heads": 0},
    "no-channels": {"channels": 0},
    "no-points": {"points": 0},
    "no-levels": {"levels": ()},
    "no-pixels": {"levels": ((0, 4), (3, 0))},
    "empty-level": {"levels": ((4, 3), (0, 5), (2, 2))},
}
# An empty level may begin anywhere: its size, its first pixel and its place among the levels.
ANYWHERE: dict[str, tuple[tuple[int, int], int, int]] = {
    "behind": ((0, 3), 21, 1),
    "before": ((3, 0), -1, 0),
    "inside": ((0, 3), 2, 0),
    "wide": ((0, 2**32 + 3), 2**40, 1),
    "high": ((2**31, 0), -(2**40), 0),
}
OWN_POINTS = ((3, 6, 3), (1, 0, 2), (0, 0, 5))


def _attention_settings(places: str, *more: Setting) -> dict[str, Setting]:
    """The settings of an op. `places`: the input that holds the locations or offsets."""
    nearest = {"method": "nearest"}
    levels = [[(4, 4), (2, 2)] for _ in ANYWHERE]
    for given, (_, _, at) in zip(levels, ANYWHERE.values()):
        given.insert(at, (0, 3))
    return by_name(
        *shrunk(ATTENTION_CASES, lambda case: (case.channels, len(case.levels), case.points)),
        Setting("odd-channels", small(channels=71)),
        *(Setting(f"channels-{n}", small(channels=n, points=3)) for n in (1, 3, 16, 30, 64)),
        Setting("nearest", SMALL, options=nearest),
        Setting("not-finite", SMALL, _in_input(places, _not_finite), ordinary=False),
        Setting("far-outside", SMALL, _in_input(places, _far_outside)),
        Setting("denormal", SMALL, _in_input(places, _denormal), ordinary=False),
        Setting("not-finite-nearest", SMALL, _in_input(places, _not_finite), options=nearest, ordinary=False),
        Setting("far-outside-nearest", SMALL, _in_input(places, _far_outside), options=nearest),
        Setting("nan-value", SMALL, _in_input("value", _nan_pixels), ordinary=False),
        Setting("nan-gradient", SMALL, gradient=with_nan, ordinary=False),
        *(
            Setting(f"{'-'.join(map(str, counts))}-points", small(points=12), options=options, ordinary=False)
            for counts in OWN_POINTS
            for options in ({"points_per_level": counts},)
        ),
        Setting(
            "1-0-2-points-nearest",
            small(points=12),
            options=nearest | {"points_per_level": (1, 0, 2)},
            ordinary=False,
        ),
        Setting("float64-places", SMALL, dtypes=("fp32",), coordinates=torch.float64),
        Setting("float16-places", SMALL, dtypes=("fp32", "fp16"), coordinates=torch.float16),
        Setting("bfloat16-places", SMALL, dtypes=("bf16",), coordinates=torch.bfloat16),
        Setting("strided", SMALL, _strided_tables, layout=every_other),
        Setting("expanded", SMALL, layout=first_of_all, gradient=one_number, ordinary=False),
        *(Setting(name, small(**sizes), ordinary=False) for name, sizes in EMPTY.items()),
        *(
            Setting(
                f"empty-level-{name}",
                small(levels=tuple(given), points=3),
                _empty_level(*where),
                dtypes=("fp32",),
                ordinary=False,
            )
            for given, (name, where) in zip(levels, ANYWHERE.items())
        ),
        Setting("many-queries", small(queries=40, points=3)),
        *more,
    )


def _strided_tables(problem: Problem) -> None:
    problem.tables = tuple(map(every_other, problem.tables))


_FUSED = (
    *(Setting(form.replace(" ", "-"), SMALL, options={"form": form}) for form in list(FORMS)[1:]),
    *(
        Setting(
            f"{'-'.join(map(str, counts))}-points-boxes",
            small(points=12),
            options={"points_per_level": counts, "form": "shared boxes"},
            ordinary=False,
        )
        for counts in OWN_POINTS
    ),
    Setting("nearest-boxes", SMALL, options={"method": "nearest", "form": "boxes"}),
    Setting("extreme-logits", SMALL, _in_input("logits", _extreme), ordinary=False),
    Setting("nan-logits", SMALL, _in_input("logits", _nan_logit), ordinary=False),
    *(
        Setting(
            f"{name}-boxes",
            SMALL,
            _nowhere(bad),
            options={"form": "boxes"},
            dtypes=("fp32", "fp64"),
            ordinary=False,
        )
        for name, bad in (("nan", NAN), ("infinite", INF), ("huge", 3e38))
    ),
)
_QUICK = (
    "hub-small",
    "lwdetr-decoder",
    "odd-channels",
    "not-finite",
    "far-outside",
    "no-queries",
    "no-batch",
)
_TIMED = ("hub-small", "detr-decoder", "detr-encoder", "m2f-512", "rtdetr-decoder", "lwdetr-decoder")
_COMMON: dict[str, Any] = {
    "cases": ATTENTION_CASES,
    "quick": _QUICK,
    "usual": (*_TIMED, "injector-B512", "extractor-B512"),
    "brief": ("hub-small", "injector-T512", "injector-B512"),
    "anchor": "gather",
    "timed": {"locations": "near"},
}

MS_DEFORM_ATTN = Op(
    "ms_deform_attn",
    ms_deform_attn,
    settings=_attention_settings(
        "locations",
        Setting("on-edges", small(levels=((4, 4), (2, 8), (1, 1)), points=4), _in_input("locations", _edges)),
    ),
    again=("hub-small", "many-queries"),
    tiny=by_name(Setting("tiny", TINY)),
    **_COMMON,
)
MS_DEFORM_ATTN_FUSED = Op(
    "ms_deform_attn_fused",
    ms_deform_attn_fused,
    settings=_attention_settings("offsets", *_FUSED),
    again=("hub-small", "boxes"),
    tiny=by_name(
        Setting("tiny", TINY),
        Setting("tiny-shared-points", TINY, options={"form": "shared points"}),
        Setting("tiny-boxes", TINY, options={"form": "boxes"}),
    ),
    **_COMMON,
)
