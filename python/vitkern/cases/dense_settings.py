# SPDX-License-Identifier: Apache-2.0
"""The records of the adapter bottleneck and the token ops: the inputs that break kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vitkern.cases.dense import ADAPTER_CASES, TOKEN_CASES, AdapterBottleneckCase, TokenCase
from vitkern.cases.dense_ops import adapter_bottleneck, token_pool, token_project
from vitkern.cases.record import (
    Op,
    Problem,
    Setting,
    by_name,
    every_other,
    one_number,
    shrunk,
    transposed,
    with_nan,
)

NAN, INF = float("nan"), float("inf")


def _fill(name: str, row: int, at: int | slice, number: float) -> Callable[[Problem], None]:
    def alter(problem: Problem) -> None:
        problem.inputs[name][..., row, at] = number

    return alter


def _adapter(*shape: int, channels: int = 40, hidden: int = 12) -> AdapterBottleneckCase:
    return AdapterBottleneckCase("small", "", shape, channels, hidden)


ADAPTER_SIZES = (
    (1, 1, 1),
    (1, 768, 64),
    (7, 33, 5),
    (65, 48, 100),
    (130, 17, 512),
    (3, 2, 511),
    (33, 256, 16),
    (20, 40, 128),
)
_GELU, _SILU = {"activation": "gelu"}, {"activation": "silu"}
_TRAINING = {"training": True, "dropout_p": 0.3}
_ABSENT = ("down_bias", "up_bias", "residual", "scale")
_BAD = (("nan", NAN), ("inf", INF), ("minus-inf", -INF))
_ADAPTER_SETTINGS = by_name(
    *shrunk(ADAPTER_CASES, lambda case: (case.channels, case.hidden)),
    *(Setting(f"{rows}x{c}x{h}", _adapter(rows, channels=c, hidden=h)) for rows, c, h in ADAPTER_SIZES),
    Setting("small", _adapter(2, 11)),
    Setting("gelu", _adapter(13), options=_GELU),
    Setting("silu", _adapter(13), options=_SILU),
    Setting("dropout", _adapter(13), options=_TRAINING),
    Setting("dropout-gelu", _adapter(2, 11), options=_TRAINING | _GELU | {"dropout_p": 0.1}),
    Setting("dropout-all", _adapter(2, 11), options=_TRAINING | _GELU | {"dropout_p": 1.0}),
    *(
        Setting(f"no-{name.replace('_', '-')}", _adapter(2, 11), options={"without": [name]})
        for name in _ABSENT
    ),
    Setting("only-weights", _adapter(2, 11), options={"without": _ABSENT, "scale": -0.3}),
    Setting("residual-x", _adapter(2, 11), options={"residual": "x"}),
    Setting("nan-row", _adapter(13), _fill("x", 1, slice(None), NAN), ordinary=False),
    *(
        Setting(f"{name}-number{kind}", _adapter(2, 11), _fill("x", 3, 5, bad), options, ordinary=False)
        for name, bad in _BAD
        for kind, options in (("", {}), ("-gelu", _GELU), ("-silu", _SILU))
    ),
    Setting("nan-gradient", _adapter(2, 11), gradient=with_nan, ordinary=False),
    Setting("strided", _adapter(2, 11), layout=every_other),
    Setting("expanded-gradient", _adapter(2, 11), gradient=one_number, ordinary=False),
    Setting("one-row", _adapter(channels=24, hidden=6)),
    Setting("no-rows", _adapter(0), ordinary=False),
    Setting("no-rows-of-three", _adapter(2, 0, 3), ordinary=False),
    Setting("no-channels", _adapter(5, channels=0), ordinary=False),
    Setting("many-rows", _adapter(150, channels=96, hidden=24), options=_TRAINING),
)
ADAPTER_BOTTLENECK = Op(
    "adapter_bottleneck",
    adapter_bottleneck,
    ADAPTER_CASES,
    _ADAPTER_SETTINGS,
    quick=("adaptformer-image", "swin-b-1", "dropout", "no-rows"),
    again=("swin-b-1", "many-rows", "residual-x"),
    tiny=by_name(
        *(
            Setting(name, _adapter(3, channels=6, hidden=4), options=_TRAINING | options)
            for name, options in (("tiny", {}), ("tiny-gelu", _GELU), ("tiny-silu", _SILU))
        )
    ),
    usual=tuple(ADAPTER_CASES),
    brief=("adaptformer-4", "one-image", "adaptformer-video"),
    anchor="product",
    timed={"residual": "x", "without": ("scale",), "scale": 0.1},
)

_TOKENS = TokenCase("small", "", 2, 37, 24, 5)
_TINY = TokenCase("tiny", "", 2, 7, 5, 3)
_TOKEN_SIZES = (
    (3, 5, 7, 2),
    (1, 300, 33, 64),
    (2, 65, 256, 16),
    (1, 129, 130, 17),
    (2, 2, 64, 8),
    (1, 40, 72, 65),
)
_PROJECT_SIZES = (
    (1, 1, 1, 1, 1),
    (3, 5, 7, 2, 3),
    (1, 130, 33, 64, 20),
    (2, 65, 256, 16, 128),
    (1, 29, 130, 17, 1),
    (1, 40, 72, 65, 33),
)
_RECURRENT = {"recurrent": True}
_TOKENS_QUICK = ("vt-resnet18", "odd-channels", "huge", "no-batch")


def _huge(problem: Problem) -> None:
    """Makes logits of hundreds: a softmax that does not subtract the largest overflows."""
    for name in ("query", "key") if "query" in problem.inputs else ("x", "weight"):
        problem.inputs[name][..., 0] = 16


def _sized(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _token_settings(*more: Setting, **options: Any) -> dict[str, Setting]:
    empty: list[dict[str, Any]] = [{size: 0} for size in ("batch", "pixels", "channels", "tokens")]
    return by_name(
        *shrunk(TOKEN_CASES, lambda case: (case.channels, case.tokens)),
        *more,
        Setting("small", _TOKENS),
        Setting("odd-channels", replace(_TOKENS, channels=71)),
        Setting("huge", _TOKENS, _huge, tolerance_factor=64),  # roundings of a few large logits
        Setting("nan-row", _TOKENS, _fill("x", 1, slice(None), NAN), ordinary=False),
        Setting("nan-gradient", _TOKENS, gradient=with_nan, ordinary=False),
        Setting("strided", _TOKENS, layout=every_other),
        Setting("transposed", _TOKENS, layout=transposed),  # as a map [B, C, H, W] lies
        Setting("expanded-gradient", _TOKENS, gradient=one_number, ordinary=False),
        *(Setting(f"no-{''.join(size)}", replace(_TOKENS, **size), ordinary=False) for size in empty),
        Setting("many-pixels", replace(_TOKENS, pixels=200, channels=48, tokens=16)),
    )


TOKEN_POOL = Op(
    "token_pool",
    token_pool,
    TOKEN_CASES,
    _token_settings(
        Setting("recurrent", _TOKENS, options=_RECURRENT),
        *(Setting(_sized(*sizes), TokenCase("any", "", *sizes)) for sizes in _TOKEN_SIZES),
        *(Setting(f"{name}-number", _TOKENS, _fill("x", 30, 2, bad), ordinary=False) for name, bad in _BAD),
        Setting("no-pixels-recurrent", replace(_TOKENS, pixels=0), options=_RECURRENT, ordinary=False),
        Setting("no-tokens-recurrent", replace(_TOKENS, tokens=0), options=_RECURRENT, ordinary=False),
    ),
    quick=(*_TOKENS_QUICK, "recurrent"),
    again=("vt-resnet18", "many-pixels", "recurrent"),
    tiny=by_name(Setting("tiny", _TINY), Setting("tiny-recurrent", _TINY, options=_RECURRENT)),
    usual=tuple(TOKEN_CASES),
    brief=("vt-resnet18", "vt-resnet50", "vt-3136"),
    anchor="product",
)
TOKEN_PROJECT = Op(
    "token_project",
    token_project,
    TOKEN_CASES,
    _token_settings(
        *(
            Setting(_sized(*sizes), TokenCase("any", "", *sizes[:-1]), options={"keys": sizes[-1]})
            for sizes in _PROJECT_SIZES
        ),
        *(
            Setting(f"{name}-number-in-{where}", _TOKENS, _fill(where, 3, 2, bad), ordinary=False)
            for name, bad in _BAD
            for where in ("x", "query", "key", "tokens")
        ),
        Setting("no-keys", _TOKENS, options={"keys": 0}, ordinary=False),
    ),
    quick=_TOKENS_QUICK,
    again=("vt-resnet18", "many-pixels"),
    tiny=by_name(Setting("tiny", _TINY, options={"keys": 4})),
    usual=tuple(TOKEN_CASES),
    brief=("vt-resnet18", "vt-resnet50", "vt-3136"),
    anchor="product",
)
