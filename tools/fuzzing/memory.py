# SPDX-License-Identifier: Apache-2.0
"""Tensors beside guarded pages, in all of torch's layouts: a kernel that reads outside of one ends the process."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_ROOM = 64  # pages of an arena; what is larger lies in memory without guards
_ARENAS = 16


@functools.cache
def _arenas() -> list[mmap.mmap]:
    """Memory whose first and last pages must not be accessed; none if the system lacks mprotect."""
    if sys.platform == "win32":
        return []
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    arenas = []
    for _ in range(_ARENAS):
        arena = mmap.mmap(-1, (_ROOM + 2) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(arena))
        for page in (0, _ROOM + 1):
            if protect(address + page * PAGE, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        arenas.append(arena)
    return arenas


@dataclass
class Placed:
    """Places the tensors of a case in memory. Only one case at a time uses the arenas."""

    rng: np.random.Generator
    used: int = 0

    def __post_init__(self) -> None:
        self._whole: list[tuple[Tensor, Tensor]] = []  # storages, and what they held

    def storage(self, count: int, dtype: torch.dtype) -> Tensor:
        """Storage for `count` elements, at either end of an arena if one is left that is large enough."""
        size, arenas = count * dtype.itemsize, _arenas()
        at_end = bool(self.rng.integers(4))  # most overruns are at the end
        if count == 0 or size > _ROOM * PAGE or self.used >= len(arenas):
            return torch.empty(count, dtype=dtype)
        offset = PAGE + (_ROOM * PAGE - size if at_end else 0)
        self.used += 1
        return torch.frombuffer(arenas[self.used - 1], dtype=dtype, count=count, offset=offset)

    def place(self, data: Tensor, layout: str) -> Tensor:
        """A copy with other strides; the gaps between the elements are NaN."""
        if layout == "negated":
            return torch._neg_view(self._strided(-data, self._permutation(data)))
        if layout == "imaginary" and data.dtype in (torch.float32, torch.float64):
            # The imaginary part of a conjugate: every second number, lazily negated.
            pairs = torch.stack([torch.full_like(data, float("nan")), -data], -1)
            return torch.view_as_complex(self._strided(pairs, range(pairs.dim()))).conj().imag
        if layout == "permuted":
            return self._strided(data, self._permutation(data))
        if layout == "sliced" and data.dim():
            return self._sliced(data)
        if layout == "offset":
            odd = int(self.rng.integers(1, 8))
            flat = torch.cat([data.new_full((odd,), float("nan")), data.flatten()])
            return self._strided(flat, [0])[odd:].view(data.shape)
        return self._strided(data, range(data.dim()))

    def _permutation(self, data: Tensor) -> list[int]:
        return [int(axis) for axis in self.rng.permutation(data.dim())]

    def _sliced(self, data: Tensor) -> Tensor:
        """A slice of one axis: with steps of 1 or 2, and up to two unused elements at the end."""
        axis, step = int(self.rng.integers(data.dim())), int(self.rng.integers(1, 3))
        shape = list(data.shape)
        shape[axis] = shape[axis] * step + int(self.rng.integers(3))
        whole = data.new_full(shape, float("nan"))
        part = [slice(None)] * data.dim()
        part[axis] = slice(0, data.shape[axis] * step, step)
        whole[tuple(part)] = data
        return self._strided(whole, range(data.dim()))[tuple(part)]

    def expanded(self, data: Tensor, axis: int) -> Tensor:
        """The first element of an axis, expanded along it without a copy."""
        first = data.narrow(axis, 0, 1)
        return self._strided(first, range(data.dim())).expand(data.shape)

    def _strided(self, data: Tensor, order: range | list[int]) -> Tensor:
        """A copy whose axes lie in memory in this order."""
        laid = data.permute(*order) if data.dim() else data
        storage = self.storage(data.numel(), data.dtype)
        storage.copy_(laid.reshape(-1))
        self._whole.append((storage, storage.clone()))
        placed = storage.view(laid.shape)
        back = sorted(range(data.dim()), key=lambda axis: order[axis])
        return placed.permute(*back) if data.dim() else placed

    def overwritten(self) -> bool:
        """Whether anything wrote to the inputs."""
        return any(not torch.equal(_bits(now), _bits(before)) for now, before in self._whole)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


LAYOUTS = ("plain", "permuted", "sliced", "offset", "negated", "imaginary", "expanded")
