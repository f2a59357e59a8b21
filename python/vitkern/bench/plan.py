# SPDX-License-Identifier: Apache-2.0
"""The rows that a request measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitkern.cases import Case
from vitkern.cases.ops import OPS
from vitkern.cases.record import Op
from vitkern.commands.choices import DTYPES, Filters, cases_exist, chosen, device_of, dtype_name, matches
from vitkern.commands.errors import CommandError
from vitkern.ops import backends

PASSES = ("forward", "backward", "both")
# Plain torch is no backend of vitkern: it is the code without vitkern.
BACKENDS = (*backends.BACKENDS, "torch")


@dataclass(frozen=True)
class Request(Filters):
    passes: Sequence[str] = ()
    batch: int | None = None


@dataclass(frozen=True)
class Subject:
    """An op on a case in a dtype: checked once, then measured in each pass, with all backends in turn."""

    op: Op
    case: Case
    dtype: torch.dtype
    device: torch.device
    backends: tuple[str, ...]
    passes: tuple[str, ...]
    batch: int

    @property
    def key(self) -> dict[str, object]:
        return {
            "op": self.op.name,
            "case": self.case.name,
            "batch": self.batch,
            "device": self.device.type,
            "dtype": dtype_name(self.dtype),
        }


def plan(request: Request) -> list[Subject]:
    device = torch.device(device_of(request.device))
    ops = [OPS[name] for name in chosen("op", request.ops, tuple(OPS)) or OPS]
    dtypes = [DTYPES[name] for name in chosen("dtype", request.dtypes, tuple(DTYPES)) or ("fp32", "bf16")]
    passes = chosen("pass", request.passes, PASSES) or PASSES[:2]
    wanted = chosen("backend", request.backends, BACKENDS)
    if request.batch is not None and request.batch < 1:
        raise CommandError(f"--batch must be at least 1, got {request.batch}")
    cases_exist(request.cases, (name for op in ops for name in op.cases))
    subjects = []
    for op in ops:
        for name in _cases(op, request):
            case, batch = _with_batch(op.cases[name], request.batch, device)
            for dtype in dtypes:
                able = _backends(wanted, device, dtype)
                subjects.append(Subject(op, case, dtype, device, able, tuple(passes), batch))
    return subjects


def one(op: str, case: str, batch: int, device: str, dtype: str, what: str, backend: str) -> Subject:
    """The subject of a row, by the row's key."""
    name = next(name for name, known in DTYPES.items() if dtype_name(known) == dtype)
    return plan(Request([op], [case], [backend], [name], device, passes=[what], batch=batch))[0]


def _cases(op: Op, request: Request) -> list[str]:
    if not request.cases:
        return list(op.brief if request.quick else op.usual)
    return [name for name in op.cases if matches(name, request.cases)]


def _with_batch(case: Case, batch: int | None, device: torch.device) -> tuple[Case, int]:
    """The case with the requested batch, by default 1 on a CPU; on a GPU that of training in the case's source."""
    batch = batch or (1 if device.type == "cpu" else case.batch)
    return case.with_batch(batch), batch


def _backends(wanted: Sequence[str], device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if not wanted:
        ours = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
        return (*(name for name in ours if backends.can_run(name, device, dtype) is None), "torch")
    for name in wanted:
        reason = None if name == "torch" else backends.can_run(name, device, dtype)
        if reason is not None:
            raise CommandError(f"backend {name} cannot run {dtype_name(dtype)} on {device}: {reason}")
    return tuple(wanted)
