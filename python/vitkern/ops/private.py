# SPDX-License-Identifier: Apache-2.0
"""All of torch's private symbols that this package uses. A torch without one of them costs speed, not the import."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Question = Callable[[], Any]


def find(path: str) -> Any:
    """A symbol of torch by its dotted name; None if this release lacks it."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


class Watchers(NamedTuple):
    """Queries that are true if the dispatcher has to see a call; None if torch lacks one."""

    dispatch_modes: Question | None
    function_modes: Question | None
    profiling: Question | None
    tracing: Question | None
    transform: Question | None  # the innermost one of torch.func, or None


def watchers() -> Watchers:
    return Watchers(
        find("_C._len_torch_dispatch_stack"),
        find("_C._len_torch_function_stack"),
        find("autograd._profiler_enabled"),
        find("_C._is_tracing"),
        find("_C._functorch.peek_interpreter_stack"),
    )


def forward_ad() -> dict[str, Any] | None:
    """The variables of torch.autograd.forward_ad, if its level is among them: -1 outside of any."""
    variables = vars(torch.autograd.forward_ad)
    return variables if "_current_level" in variables else None


def any_autocast() -> Question:
    """Whether autocast is on for any device."""
    found: Question | None = find("_C._is_any_autocast_enabled")
    return found or (lambda: any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))


def current_stream(device: int) -> Callable[[], int]:
    """A function that returns a GPU's current stream."""
    raw = find("_C._cuda_getCurrentRawStream")
    if raw is None:
        return lambda: torch.cuda.current_stream(device).cuda_stream
    return lambda: raw(device)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function's apply, without its first step, which looks for torch.func's wrappers: the fast path has none."""
    apply = getattr(super(torch.autograd.Function, function), "apply", None)
    return apply or function.apply


def is_gradient(interpreter: Any) -> bool:
    """Whether a transform of torch.func takes gradients."""
    kind = find("_C._functorch.TransformType")
    return kind is not None and interpreter.key() == kind.Grad


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sets the mark of torch.compiler.assume_constant_result without its import of the compiler, which is slow."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Device types, and type codes and bits, in DLPack's numbering.
_DEVICES = {"cpu": 1, "cuda": 2}
_TYPES = {
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
}


def describe(tensor: Tensor) -> tuple[Any, ...] | None:
    """The fields of DLPack's C exchange API (csrc/host/tensor.h), read from the tensor one by one."""
    device, code = _DEVICES.get(tensor.device.type), _TYPES.get(tensor.dtype)
    lazily_zero = getattr(tensor, "_is_zerotensor", bool)()
    if device is None or code is None or tensor.layout != torch.strided or lazily_zero:
        return None
    return tensor.data_ptr(), device, max(tensor.get_device(), 0), *code, tensor.shape, tensor.stride()


def borrow() -> Any:
    """The way in which compiled code borrows a tensor: DLPack's C exchange API, or a function for older releases."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", describe)


def room_by_python(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its storage."""
    return tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.element_size()


def room() -> Any:
    """The same for compiled code: two addresses of torch's C functions, or the function above."""
    names = "aoti_torch_get_storage_size", "aoti_torch_get_storage_offset"
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib") if hasattr(Tensor, "_cdata") else ():
        path = Path(torch.__file__).parent / "lib" / library
        with contextlib.suppress(AttributeError, OSError):
            loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # only torch's loaded library
            return tuple(ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in names)
    return room_by_python
