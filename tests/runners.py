# SPDX-License-Identifier: Apache-2.0
"""The runners of the kernels in the tests: those of `vitkern check`, and some that only a checkout has.

Tests with a runner that cannot run here are skipped with the reason.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from tests import emulated, wide
from vitkern.check.examine import deterministic
from vitkern.check.routes import Route, all_routes
from vitkern.ops import backends, native


@dataclass(frozen=True)
class Runner(Route):
    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for dtype in backends.DTYPES if self.lacks(dtype) is None)

    @property
    def marks(self) -> tuple[pytest.MarkDecorator, ...]:
        marks = (pytest.mark.gpu,) if self.device == "cuda" else ()
        if self.name == "cpu-wide":  # one worker builds it
            marks += (pytest.mark.xdist_group("wide"),)
        return (*marks, pytest.mark.skip(reason=self.reason)) if self.reason else marks


def _emulator():
    return mock.patch.object(native, "cuda_module", emulated.module())


@contextlib.contextmanager
def _ordered_emulator():
    with deterministic(True), _emulator():
        yield


def _wide_vectors():
    return mock.patch.object(native, "_C", wide.module())


# Built here when a test asks for them.
_BUILT = [
    Runner("cuda-emulated", "cuda", "cpu", emulated.REASON, _emulator, slow=True),
    Runner("cpu-wide", "cpu", "cpu", wide.REASON, _wide_vectors),
]
_ROUTES = {route.name: route for route in all_routes(None)}
REFERENCE = Runner(**vars(_ROUTES["reference"]))
_KERNELS = [route for route in _ROUTES.values() if route.backend != "reference"]
RUNNERS = [Runner(**vars(route)) for route in _KERNELS if route.name != "cuda-emulated"] + _BUILT

# The emulated CUDA kernels with the ordered gather of grad_value instead of atomics.
ORDERED = Runner("cuda-emulated-ordered", "cuda", "cpu", emulated.REASON, _ordered_emulator, slow=True)
