# SPDX-License-Identifier: Apache-2.0
"""The record of an op: one description that checks, benchmarks and tests all read. cases/ops.py has them.

An op's `make` builds a Problem from a case. A Setting is a case made hard; `vitkern check` and tests/test_contract.py
run all settings, `vitkern bench` times the cases themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitkern.cases.attention import MsDeformAttnCase
from vitkern.cases.dense import AdapterBottleneckCase, TokenCase
from vitkern.cases.results import Function

Case = MsDeformAttnCase | AdapterBottleneckCase | TokenCase


@dataclass
class Problem:
    """An op on the inputs of a case, every input with a gradient."""

    inputs: dict[str, Tensor]
    call: Function  # of the inputs and backend=; tables= replaces the tables
    by_torch: Function  # the usual code without vitkern, which benchmarks time
    other: Function | None = (
        None  # by other functions of torch if by_torch is the reference, which is checked against it
    )
    tables: tuple[Tensor, ...] = ()  # further arguments of the op, which get no gradient
    wide: tuple[str, ...] = ()  # inputs that stay float32 beside 16-bit ones
    with_heads: tuple[str, ...] = ()  # inputs whose third dimension is heads, which are independent
    # Results that are one long sum. Plain torch's error in an element is a matter of luck, so the magnitude of the
    # terms, as a function of the output, sets the limit too.
    sums: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    # Inputs with gradients that can be compared in some elements only: a mask, as a function of all inputs.
    comparable: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = field(default_factory=dict)
    others: Mapping[str, Function] = field(default_factory=dict)  # further contenders of a benchmark

    @property
    def formula(self) -> Function:
        """The op in torch without any code of the reference."""
        return self.other or self.by_torch

    def implementation(self, backend: str) -> Function:
        """The op on a backend, or by "torch" or one of the others."""
        if backend == "torch":
            return self.by_torch
        if backend in self.others:
            return self.others[backend]
        return lambda *tensors: self.call(*tensors, backend=backend)

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, inputs={name: tensor.to(dtype) for name, tensor in self.inputs.items()})


def as_it_is(anything: Any) -> Any:
    return anything


@dataclass(frozen=True, eq=False)
class Setting:
    """The inputs of a check of an op."""

    name: str
    case: Case
    alter: Callable[[Problem], object] = as_it_is  # makes the inputs worse, in place
    options: Mapping[str, Any] = field(default_factory=dict)  # of the op's `make`
    dtypes: tuple[str, ...] = ()  # the only ones, if any
    coordinates: torch.dtype | None = None  # of the inputs that are wide, instead of float32 or better
    layout: Callable[[Tensor], Tensor] = as_it_is  # the same numbers at other addresses
    gradient: Callable[[Tensor], Tensor] = as_it_is  # instead of a random gradient of the output
    same_as: str | None = None  # an earlier setting that takes the same way through the kernels
    heavy: bool = False  # too much for kernels that are emulated or interpreted
    ordinary: bool = True  # finite numbers, none of the sizes 0
    tolerance_factor: float = (
        1.0  # the factor on the allowed error, where plain torch's error is a matter of luck
    )

    @property
    def plain(self) -> bool:
        """Whether any implementation of the op has to get it right."""
        special = self.options or self.dtypes or self.coordinates
        return self.ordinary and not special and self.layout is self.gradient is as_it_is

    def tensors(self, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The problem's inputs in `dtype`, the wide ones in a wider one."""
        wide = self.coordinates or torch.promote_types(dtype, torch.float32)
        return tuple(
            self.layout(tensor.to(wide if name in problem.wide else dtype))
            for name, tensor in problem.inputs.items()
        )


@dataclass(frozen=True, eq=False)
class Op:
    name: str
    make: Callable[..., Problem]  # of a case, a device, a seed and options: inputs in float64
    cases: Mapping[str, Any]  # the shapes that users run
    settings: Mapping[str, Setting]  # the inputs that are checked
    quick: tuple[str, ...]  # settings of a quick check
    again: tuple[str, ...]  # settings that must give the same bits at each call, and each gradient alone
    tiny: Mapping[str, Setting]  # for finite differences
    usual: tuple[str, ...]  # cases that are timed by default
    brief: tuple[str, ...]  # cases of a quick benchmark: small, and of several sizes
    anchor: str  # the kernel of torch that is timed in turn with it, see bench/ceilings.py
    timed: Mapping[str, Any] = field(default_factory=dict)  # options of `make` when it is timed

    def problem(self, setting: Setting, *, device: str, seed: int, tiny: bool = False) -> Problem:
        """The inputs of a check, in float64."""
        case = _smaller(setting.case) if tiny else setting.case
        problem = self.make(case, device, seed, **setting.options)
        setting.alter(problem)
        return problem

    def workload(self, case: Case, dtype: torch.dtype, device: str) -> Problem:
        """The problem that a benchmark runs: inputs as in networks, in `dtype`."""
        return self.make(case, device, 0, **self.timed).to(dtype)


def _smaller(case: Case) -> Case:
    """A smaller case for the interpreter: one image and head are enough for its arithmetic."""
    if isinstance(case, MsDeformAttnCase):
        batch, heads, queries = min(case.batch, 1), min(case.heads, 1), min(case.query_count, 6)
        return replace(case, batch=batch, heads=heads, queries=queries)
    if isinstance(case, TokenCase):
        return replace(case, batch=min(case.batch, 1))
    return case


def by_name(*settings: Setting) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


def shrunk(cases: Mapping[str, Any], dispatch: Callable[[Any], object], **options: Any) -> list[Setting]:
    """The cases made small; cases of one `dispatch` take the same way through the kernels."""
    first: dict[object, str] = {}
    found = []
    for name, case in cases.items():
        kind = dispatch(case)
        heavy = not isinstance(case, MsDeformAttnCase) and case.channels > 256
        found.append(Setting(name, case.shrunk(), same_as=first.get(kind), heavy=heavy, options=options))
        first.setdefault(kind, name)
    return found


def every_other(tensor: Tensor) -> Tensor:
    """The same numbers with a gap after each."""
    return torch.stack([tensor] * 2, -1)[..., 1]


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, the last but one dimension innermost in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def first_of_all(tensor: Tensor) -> Tensor:
    """The first image, expanded to all images in the memory of one."""
    return tensor[:1].expand_as(tensor)


def one_number(tensor: Tensor) -> Tensor:
    """A gradient in the memory of one number, expanded as by .sum().backward()."""
    return torch.ones((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def with_nan(tensor: Tensor) -> Tensor:
    """A gradient with one NaN, and another one in another row if there are more rows."""
    tensor = tensor.clone()
    tensor.view(-1, tensor.shape[-1])[-2:, -1] = float("nan")
    return tensor
