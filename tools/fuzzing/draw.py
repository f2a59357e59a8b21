# SPDX-License-Identifier: Apache-2.0
"""A case from its number: backend, op, dtype, shapes, strides, numbers, options, and the needed gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.fuzzing.memory import LAYOUTS, Placed

OPS = ("ms_deform_attn", "ms_deform_attn_fused", "adapter_bottleneck", "token_pool", "token_project")
# How often each backend comes: what takes longer comes less often.
BACKENDS = {"cpu": 0.635, "reference": 0.2, "cuda": 0.11, "triton": 0.055}
DTYPES = ("float32", "float64", "float16", "bfloat16")
TORCH = {name: getattr(torch, name) for name in DTYPES}
_HUGE = {"float32": (10, 30), "float64": (10, 60), "float16": (2, 4.7), "bfloat16": (10, 30)}
_TINY = {"float32": (-45, -36), "float64": (-300, -280), "float16": (-8, -5), "bfloat16": (-40, -36)}
_BAD = (float("nan"), float("inf"), -float("inf"))


@dataclass
class Case:
    number: int
    op: str
    backend: str
    dtype: str
    places: Placed
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    levels: list[tuple[int, int]] = field(default_factory=list)  # (height, width)
    starts: list[int] = field(default_factory=list)
    tables: tuple[Any, Any] = (None, None)  # the levels and their first pixels as they are given
    options: dict[str, Any] = field(default_factory=dict)
    grad_output: Tensor = field(default_factory=lambda: torch.empty(0))
    wanted: tuple[str, ...] = ()  # the tensors whose gradients are needed
    isa: int = 0  # which of the instruction sets
    threads: int = 1
    deterministic: bool = False
    guarded: bool = True  # results between margins
    twice: bool = False  # a second call takes a shorter way
    residual_is_x: bool = False
    mode: str = "grad"  # or "no_grad" or "inference": what is around the call

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name, which must not be None."""
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    @property
    def first(self) -> Tensor:
        """The tensor whose dtype the result has."""
        return self.tensor(next(iter(self.tensors)))

    @property
    def small(self) -> bool:
        """Whether the case must be small, because the kernels are emulated or interpreted."""
        return self.backend in ("cuda", "triton")


class Draw:
    """Draws the parts of a case."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case, self.rng = case, rng
        self.ordinary = rng.random() < 0.6  # all tensors of usual numbers, or each of its own kind
        self.contiguous = rng.random() < 0.3

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def size(self, most: int, *, empty: float = 0.02) -> int:
        """A size up to `most`: rarely 0, often 1, else with equal chances one near vectors and tiles or any other."""
        if self.chance(empty):
            return 0
        if self.chance(0.15):
            return 1
        near = [n for n in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96) if n <= most]
        if near and self.chance(0.5):
            return int(self.one_of(near))
        return int(self.rng.integers(1, most + 1))

    def other_dtype(self, often: float = 0.25) -> str:
        return str(self.one_of(DTYPES)) if self.chance(often) else self.case.dtype

    def numbers(self, shape: Sequence[int], dtype: str, *, bad: bool = True) -> Tensor:
        """Random numbers: usual, huge, tiny, whole, sparse, of all magnitudes, or with some that are not finite."""
        data = self.rng.standard_normal(shape)
        kinds = ["huge", "tiny", "whole", "wide", "zero", *(["bad"] * 2 if bad else [])]
        kind = "usual" if self.ordinary or self.chance(0.4) else self.one_of(kinds)
        if kind in ("huge", "tiny"):
            data *= 10.0 ** self.rng.uniform(*(_HUGE if kind == "huge" else _TINY)[dtype])
        elif kind == "whole":
            data = np.round(2 * data)
        elif kind == "wide":
            data *= 10.0 ** self.rng.uniform(-6, 4, shape)
        elif kind == "zero":
            data *= self.rng.random(shape) < 0.3
        if dtype == "float16":
            data = np.clip(data, -65504, 65504)
        if dtype == "bfloat16" and self.case.backend == "triton":
            data *= np.abs(data) > 1e-35  # its interpreter has no subnormal ones
        if kind == "bad":
            self.spoil(data)
        return torch.from_numpy(np.asarray(data)).to(TORCH[dtype])

    def spoil(self, data: np.ndarray) -> None:
        flat = data.reshape(-1)
        for _ in range(int(self.rng.integers(1, 4)) if flat.size else 0):
            flat[self.rng.integers(flat.size)] = self.one_of(_BAD)

    def placed(self, data: Tensor) -> Tensor:
        layout = "plain" if self.contiguous else str(self.one_of(LAYOUTS))
        if layout == "expanded" and data.numel():
            return self.case.places.expanded(data, int(self.rng.integers(data.dim()))) if data.dim() else data
        return self.case.places.place(data, layout)

    def tensor(self, name: str, shape: Sequence[int], dtype: str) -> None:
        self.case.tensors[name] = self.placed(self.numbers(shape, dtype))

    def finish(self, output: Sequence[int], dtype: str) -> Case:
        """Adds grad_output, and the tensors whose gradients are needed, to the op's own parts."""
        case = self.case
        case.grad_output = self.placed(self.numbers(output, dtype))
        names = [name for name, tensor in case.tensors.items() if tensor is not None]
        if case.mode == "grad":
            case.wanted = tuple(names if self.chance(0.5) else (n for n in names if self.chance(0.5)))
        return case


def begin(number: int) -> tuple[Case, np.random.Generator]:
    """Draws only op, backend and dtype, by which case numbers can be selected quickly."""
    rng = np.random.Generator(np.random.PCG64(number))
    backend = str(rng.choice(list(BACKENDS), p=list(BACKENDS.values())))
    dtypes = [name for name in DTYPES if (backend, name) != ("triton", "float64")]
    op, dtype = str(rng.choice(OPS)), str(rng.choice(dtypes))
    return Case(number, op, backend, dtype, Placed(rng)), rng


def draw(number: int) -> Case:
    from tools.fuzzing.draw_ops import DRAWN

    case, rng = begin(number)
    case.isa, case.threads = int(rng.integers(64)), int(rng.choice([1, 1, 1, 2, 3]))
    case.deterministic, case.guarded = bool(rng.random() < 0.3), bool(rng.random() < 0.7)
    case.twice = bool(rng.random() < 0.4) and case.backend != "triton"
    case.mode = str(rng.choice(["grad", "no_grad", "inference"], p=[0.94, 0.03, 0.03]))
    return DRAWN[case.op](Draw(case, rng))
