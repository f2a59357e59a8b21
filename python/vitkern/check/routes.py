# SPDX-License-Identifier: Apache-2.0
"""The ways in which kernels can run: instruction sets, the emulated CUDA kernels, Triton's interpreter, a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from vitkern import _C
from vitkern.commands.choices import device_of
from vitkern.ops import backends, native, op

EMULATED = "VITKERN_EMULATED"
INTERPRET = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Route:
    name: str
    backend: str
    device: str
    reason: str | None  # why it cannot run here, if it cannot
    enter: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    slow: bool = False  # one case of each dispatch
    tiny: bool = False  # and a smaller one: each program of the kernel costs seconds
    own_process: bool = False  # in a process of its own, which sets the variable of INTERPRET

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        op.forget_plans()
        try:
            with self.enter():
                yield
        finally:
            op.forget_plans()

    def lacks(self, dtype: torch.dtype) -> str | None:
        """The reason why the backend cannot run this dtype, if so."""
        if self.backend == "triton" and dtype == torch.float64:
            return "the Triton kernels have no float64"
        return None


def all_routes(device: str | None) -> list[Route]:
    """The routes of a device, by default of all devices on this machine."""
    on_gpu = device_of(device) == "cuda"
    routes = []
    if device != "cuda":
        routes += [Route("reference", "reference", "cpu", None), *map(_cpu, _C.compiled_cpu_isas())]
    if on_gpu:
        routes += [Route(f"{name}-gpu", name, "cuda", _objection(name)) for name in ("cuda", "triton")]
        routes += [Route("reference-gpu", "reference", "cuda", None)]
    else:
        routes += [_no_gpu("cuda"), _no_gpu("triton")]
    if device != "cuda":
        routes += [_emulated(on_gpu), _interpreted(on_gpu)]
    return routes


def _no_gpu(backend: str) -> Route:
    reason = "--device cpu was asked for" if torch.cuda.is_available() else "torch sees no GPU"
    return Route(f"{backend}-gpu", backend, "cuda", reason)


def _objection(backend: str) -> str | None:
    return backends.can_run(backend, torch.device("cuda", torch.cuda.current_device()), torch.float32)


def _cpu(isa: str) -> Route:
    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        before = _C.cpu_isa()
        _C.set_cpu_isa(isa)
        try:
            yield
        finally:
            _C.set_cpu_isa(before)

    reason = None if isa in _C.supported_cpu_isas() else f"this chip has no {isa}"
    return Route(f"cpu-{isa}", "cpu", "cpu", reason, enter)


def _emulated(on_gpu: bool) -> Route:
    path = os.environ.get(EMULATED)
    reason = None
    if on_gpu:
        reason = "a GPU runs the kernels themselves (--device cpu emulates them)"
    elif not path:
        reason = f'in a checkout, {EMULATED}="$(python -m tests.emulated)" builds them; no wheel has them'
    elif not Path(path).is_file():
        reason = f"{EMULATED} is {path}, and there is no such file"
    return Route("cuda-emulated", "cuda", "cpu", reason, _enter_emulated, slow=True)


@contextlib.contextmanager
def _enter_emulated() -> Iterator[None]:
    before = native.cuda_module
    native.cuda_module = _load(os.environ[EMULATED])
    try:
        yield
    finally:
        native.cuda_module = before


@functools.cache
def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _interpreted(on_gpu: bool) -> Route:
    reason = None
    if on_gpu:
        reason = "a GPU runs the kernels themselves (--device cpu interprets them)"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    own_process = os.environ.get(INTERPRET) != "1"
    return Route("triton-interpreted", "triton", "cpu", reason, slow=True, tiny=True, own_process=own_process)
