# SPDX-License-Identifier: Apache-2.0
"""From what the user asks for to the rows that are measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vitkern import backends
from vitkern.bench.errors import BenchError
from vitkern.bench.workloads import OPS, Op
from vitkern.cases import Case

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
PASSES = ("forward", "backward", "both")
# Plain torch is no backend of vitkern: it is what one would write without it.
BACKENDS = (*backends.BACKENDS, "torch")


@dataclass(frozen=True)
class Request:
    """What the command line asks for; empty: what is usual."""

    ops: Sequence[str] = ()
    cases: Sequence[str] = ()  # names, or patterns such as injector-*
    backends: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    passes: Sequence[str] = ()
    device: str | None = None
    batch: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Subject:
    """An op on a case in a dtype: checked once, then measured in each pass, all backends in turn."""

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
            "dtype": str(self.dtype)[6:],
        }


def plan(request: Request) -> list[Subject]:
    device = _device(request.device)
    ops = _known("op", request.ops, tuple(OPS)) or tuple(OPS)
    dtypes = [DTYPES[name] for name in _known("dtype", request.dtypes, tuple(DTYPES)) or ("fp32", "bf16")]
    passes = _known("pass", request.passes, PASSES) or PASSES[:2]
    wanted = _known("backend", request.backends, BACKENDS)
    if request.batch is not None and request.batch < 1:
        raise BenchError(f"--batch must be at least 1, got {request.batch}")
    # Each op has other cases, so a name is unknown only if none of the ops has it.
    known = sorted({name for op in ops for name in OPS[op].cases})
    for asked in request.cases:
        if not fnmatch.filter(known, asked):
            raise BenchError(f"no case is called {asked}; there are {', '.join(known)}")
    subjects = []
    for op in (OPS[name] for name in ops):
        for name in _cases(op, request):
            case, batch = _with_batch(op.cases[name], request.batch, device)
            for dtype in dtypes:
                able = _backends(wanted, device, dtype)
                subjects.append(Subject(op, case, dtype, device, able, tuple(passes), batch))
    return subjects


def one(op: str, case: str, batch: int, device: str, dtype: str, what: str, backend: str) -> Subject:
    """The subject of a row, by the row's key."""
    name = next(name for name, known in DTYPES.items() if str(known)[6:] == dtype)
    return plan(Request([op], [case], [backend], [name], [what], device, batch))[0]


def _known(what: str, asked: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    for name in asked:
        if name not in known:
            raise BenchError(f"no {what} is called {name}; there are {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(
            "torch finds no usable GPU here (`vitkern doctor` says more), so --device has to be cpu"
        )
    return device


def _cases(op: Op, request: Request) -> list[str]:
    if not request.cases:
        return list(op.quick if request.quick else op.usual)
    return [name for name in op.cases if any(fnmatch.fnmatchcase(name, asked) for asked in request.cases)]


def _with_batch(case: Case, batch: int | None, device: torch.device) -> tuple[Case, int]:
    """As asked for; else an image at a time on a CPU, and on a GPU what the case's source trains with."""
    batch = batch or (1 if device.type == "cpu" else case.batch)
    return case.with_batch(batch), batch


def _backends(wanted: Sequence[str], device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if not wanted:
        ours = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
        return (*(name for name in ours if backends.can_run(name, device, dtype) is None), "torch")
    for name in wanted:
        reason = None if name == "torch" else backends.can_run(name, device, dtype)
        if reason is not None:
            raise BenchError(f"backend {name} cannot run {str(dtype)[6:]} on {device}: {reason}")
    return tuple(wanted)
