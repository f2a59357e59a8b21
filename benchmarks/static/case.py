# SPDX-License-Identifier: Apache-2.0
"""A measured case: a kernel, its compilation, its loop over points, and the targets of its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Points:
    """The properties of the loop over sampling points: its loads, and the points and channels of a thread."""

    load: str  # opcode of the loads that are counted
    loads: int  # of a point
    channels: int  # of a thread
    round: int  # points that the loop around it goes on by
    total: int = 16  # points of a query and head


@dataclass(frozen=True)
class Target:
    """Targets of a kernel's figures, compared on sm_90."""

    instructions: float | None = None  # of a point and channel, with locating
    occupancy: int = 50  # percent
    width: int = 0  # bytes of the widest load


@dataclass(frozen=True)
class Cuda:
    """An instance of a kernel template of csrc or benchmarks."""

    header: str  # as #include takes it
    name: str  # ms_deform_attn_forward<float, 32, false>
    parameters: str
    namespace: str = "vitkern"


@dataclass(frozen=True)
class Triton:
    """A specialised @triton.jit function; `specialise` returns the function, its signature, constants and options."""

    specialise: Callable[[], tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    op: str
    backend: str  # cuda, triton, baseline
    kernel: str  # forward
    form: str
    dtype: str
    channels: int
    threads: int  # of a block
    source: Cuda | Triton
    shared: int = 0  # bytes that the launch asks for
    points: Points | None = None
    target: Target | None = None

    @property
    def label(self) -> str:
        return f"{self.op} {self.backend} {self.kernel} {self.form} {self.dtype}x{self.channels}"
