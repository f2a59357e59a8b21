# SPDX-License-Identifier: Apache-2.0
"""The ways in which the suite runs the kernels. A runner that cannot run here is skipped with its reason."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from tests import emulated, wide
from vitkern import _C, backends
from vitkern.ops import native, op


@dataclass(frozen=True)
class Runner:
    name: str
    backend: str
    activate: Callable[[], contextlib.AbstractContextManager]
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = backends.DTYPES
    slow: bool = False  # small shapes only
    interpreted: bool = False  # the smallest ones
    marks: tuple = ()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        op.forget_plans()
        with self.activate():
            yield
        op.forget_plans()


def _instruction_set(name: str):
    @contextlib.contextmanager
    def activate():
        before = _C.cpu_isa()
        _C.set_cpu_isa(name)
        yield
        _C.set_cpu_isa(before)

    return activate


@contextlib.contextmanager
def _wide_vectors():
    native._C = wide.module()
    yield
    native._C = _C


@contextlib.contextmanager
def _emulator():
    native.cuda_module = emulated.module()
    yield
    native.cuda_module = _C


@contextlib.contextmanager
def _ordered_emulator():
    torch.use_deterministic_algorithms(True)
    with _emulator():
        yield
    torch.use_deterministic_algorithms(False)


def _reason(condition: object, reason: str) -> tuple:
    return () if condition else (pytest.mark.skip(reason=reason),)


_NO_FP64 = tuple(dtype for dtype in backends.DTYPES if dtype != torch.float64)
_HAS_GPU = torch.cuda.is_available()
_HAS_TRITON = importlib.util.find_spec("triton") is not None

RUNNERS = [
    *(
        Runner(
            f"cpu-{isa}",
            "cpu",
            _instruction_set(isa),
            marks=_reason(isa in _C.supported_cpu_isas(), f"this chip has no {isa}"),
        )
        for isa in _C.compiled_cpu_isas()
    ),
    Runner("cpu-wide", "cpu", _wide_vectors, marks=_reason(wide.REASON is None, str(wide.REASON))),
    Runner(
        "cuda-emulated",
        "cuda",
        _emulator,
        slow=True,
        marks=_reason(emulated.REASON is None, str(emulated.REASON)),
    ),
    Runner(
        "triton-interpreted",
        "triton",
        contextlib.nullcontext,
        dtypes=_NO_FP64,
        slow=True,
        interpreted=True,
        marks=_reason(
            _HAS_TRITON and not _HAS_GPU, "a GPU runs the compiled kernels" if _HAS_GPU else "no triton"
        ),
    ),
    Runner(
        "cuda-gpu",
        "cuda",
        contextlib.nullcontext,
        "cuda",
        marks=(pytest.mark.gpu, *_reason(_HAS_GPU, "no GPU")),
    ),
    Runner(
        "triton-gpu",
        "triton",
        contextlib.nullcontext,
        "cuda",
        dtypes=_NO_FP64,
        marks=(pytest.mark.gpu, *_reason(_HAS_GPU and _HAS_TRITON, "no GPU" if _HAS_TRITON else "no triton")),
    ),
]

# The emulated CUDA kernels with the ordered gather of grad_value in the place of atomics.
ORDERED = Runner(
    "cuda-emulated-ordered",
    "cuda",
    _ordered_emulator,
    slow=True,
    marks=_reason(emulated.REASON is None, str(emulated.REASON)),
)
