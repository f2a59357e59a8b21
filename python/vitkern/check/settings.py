# SPDX-License-Identifier: Apache-2.0
"""What each op is checked on: the shapes that people run, made small, and the inputs that break kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitkern.cases import (
    ADAPTER_CASES,
    ATTENTION_CASES,
    TOKEN_CASES,
    AdapterBottleneckCase,
    Case,
    MsDeformAttnCase,
    TokenCase,
)
from vitkern.check import problems
from vitkern.check.problems import Problem

Inputs = dict[str, Tensor]
NAN, INF = float("nan"), float("inf")


def _as_they_are(inputs: Inputs) -> None:
    pass


@dataclass(frozen=True)
class Setting:
    """Inputs that an op is checked on."""

    name: str
    case: Case
    twist: Callable[[Inputs], None] = _as_they_are  # makes them worse, in place
    options: Mapping[str, object] = field(default_factory=dict)
    same_as: str | None = None  # a setting before it that takes the same way through the kernels
    ordinary: bool = True  # finite numbers, none of the sizes 0
    luck: float = 1.0  # so many times the usual error is allowed, where plain torch's is a matter of luck


@dataclass(frozen=True)
class Op:
    name: str
    make: Callable[..., Problem]
    settings: Mapping[str, Setting]
    quick: tuple[str, ...]  # of them, with --quick; the first is also run again and again for the same bits
    tiny: Case  # for finite differences

    def problem(self, setting: Setting, *, device: str, seed: int, tiny: bool = False) -> Problem:
        case = _smaller(setting.case) if tiny else setting.case
        problem = self.make(case, device, seed, **setting.options)
        setting.twist(problem.inputs)
        return problem


def _smaller(case: Case) -> Case:
    """For the interpreter: one image and head are enough for its arithmetic."""
    if isinstance(case, MsDeformAttnCase):
        return replace(
            case, batch=min(case.batch, 1), heads=min(case.heads, 1), queries=min(case.query_count, 6)
        )
    if isinstance(case, TokenCase):
        return replace(case, batch=min(case.batch, 1))
    return case


def _by_name(*settings: Setting) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


def _shrunk(cases: Mapping[str, Any], dispatch: Callable[[Any], object]) -> list[Setting]:
    """Cases made small. Those of one `dispatch` take the same way through the kernels."""
    first: dict[object, str] = {}
    found = []
    for name, case in cases.items():
        kind = dispatch(case)
        found.append(Setting(name, case.shrunk(), same_as=first.get(kind)))
        first.setdefault(kind, name)
    return found


_ATTENTION = MsDeformAttnCase("small", "", 2, ((5, 7), (3, 4), (2, 1)), 9, 3, 32, 5)
_ATTENTION_TINY = MsDeformAttnCase("tiny", "", 1, ((4, 3), (2, 2)), 2, 2, 3, 2)
_ATTENTION_QUICK = ("hub-small", "lwdetr-decoder", "not-finite", "far-outside", "no-queries", "no-batch")
_FAR = (1e30, -1e30, 3e37, -7.0, 1e9)


def _not_finite(name: str) -> Callable[[Inputs], None]:
    def twist(inputs: Inputs) -> None:
        bad = torch.tensor([NAN, INF, -INF, NAN, -INF], dtype=torch.float64)
        inputs[name][:, 1, :, :, :, 0] = bad.to(inputs[name].device)
        inputs[name][:, 2, :, :, :, 1] = bad.to(inputs[name].device)

    return twist


def _far_outside(name: str) -> Callable[[Inputs], None]:
    def twist(inputs: Inputs) -> None:
        inputs[name][:, 3, :, :, :, 0] = torch.tensor(_FAR, dtype=torch.float64).to(inputs[name].device)
        inputs[name][:, 4] = -7.0

    return twist


def _nan_pixel(inputs: Inputs) -> None:
    inputs["value"][:, 3] = NAN


def _attention_settings(places: str) -> dict[str, Setting]:
    """`places`: the input that says where is sampled."""
    none: dict[str, Any] = {"batch": 0, "queries": 0, "heads": 0, "points": 0}
    return _by_name(
        *_shrunk(ATTENTION_CASES, lambda case: (case.channels, len(case.levels), case.points)),
        Setting("odd-channels", replace(_ATTENTION, channels=71)),
        Setting("nearest", _ATTENTION, options={"method": "nearest"}),
        Setting("not-finite", _ATTENTION, _not_finite(places), ordinary=False),
        Setting("far-outside", _ATTENTION, _far_outside(places)),
        Setting("nan-value", _ATTENTION, _nan_pixel, ordinary=False),
        *(Setting(f"no-{size}", replace(_ATTENTION, **{size: none[size]}), ordinary=False) for size in none),
        Setting("empty-level", replace(_ATTENTION, levels=((4, 3), (0, 5), (2, 2))), ordinary=False),
    )


_ADAPTER = AdapterBottleneckCase("small", "", (13,), 40, 12)
_TOKENS = TokenCase("small", "", 2, 37, 24, 5)
_TOKENS_TINY = TokenCase("tiny", "", 2, 7, 5, 3)
_TOKENS_QUICK = ("vt-resnet18", "odd-channels", "huge", "no-batch")


def _nan_row(inputs: Inputs) -> None:
    inputs["x"][..., 1, :] = NAN


def _huge(inputs: Inputs) -> None:
    """Logits of hundreds: a softmax that does not take the greatest away overflows."""
    for name in ("query", "key") if "query" in inputs else ("x", "weight"):
        inputs[name][..., 0] = 16


_ADAPTER_SETTINGS = _by_name(
    *_shrunk(ADAPTER_CASES, lambda case: (case.channels, case.hidden)),
    Setting("gelu", _ADAPTER, options={"activation": "gelu"}),
    Setting("silu", _ADAPTER, options={"activation": "silu"}),
    Setting("dropout", _ADAPTER, options={"dropout_p": 0.3, "training": True}),
    Setting("nan-row", _ADAPTER, _nan_row, ordinary=False),
    Setting("no-rows", replace(_ADAPTER, shape=(0,)), ordinary=False),
)


def _token_settings(*more: Setting) -> dict[str, Setting]:
    return _by_name(
        *_shrunk(TOKEN_CASES, lambda case: (case.channels, case.tokens)),
        *more,
        Setting("odd-channels", replace(_TOKENS, channels=71)),
        Setting("huge", _TOKENS, _huge, luck=64),  # roundings of a few great logits
        Setting("nan-row", _TOKENS, _nan_row, ordinary=False),
        Setting("no-batch", replace(_TOKENS, batch=0), ordinary=False),
    )


OPS = {
    op.name: op
    for op in (
        Op(
            "ms_deform_attn",
            problems.ms_deform_attn,
            _attention_settings("locations"),
            _ATTENTION_QUICK,
            _ATTENTION_TINY,
        ),
        Op(
            "ms_deform_attn_fused",
            problems.ms_deform_attn_fused,
            _attention_settings("offsets"),
            _ATTENTION_QUICK,
            _ATTENTION_TINY,
        ),
        Op(
            "adapter_bottleneck",
            problems.adapter_bottleneck,
            _ADAPTER_SETTINGS,
            ("adaptformer-image", "swin-b-1", "dropout", "no-rows"),
            AdapterBottleneckCase("tiny", "", (3,), 6, 4),
        ),
        Op(
            "token_pool",
            problems.token_pool,
            _token_settings(Setting("recurrent", _TOKENS, options={"recurrent": True})),
            (*_TOKENS_QUICK, "recurrent"),
            _TOKENS_TINY,
        ),
        Op(
            "token_project",
            problems.token_project,
            _token_settings(),
            _TOKENS_QUICK,
            _TOKENS_TINY,
        ),
    )
}
