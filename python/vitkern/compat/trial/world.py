# SPDX-License-Identifier: Apache-2.0
"""Copies of the user's functions with their own globals, so that a trial changes no module and can stage a machine.

In such a world torch may report a card, or that it is compiling, and a compiled module that is missing or only for
CUDA is replaced by the published op. The copies share their code with the originals, so coverage recognises them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from vitkern import reference
from vitkern.compat.trial import registries
from vitkern.compat.trial.copies import Copies
from vitkern.compat.trial.functions import (
    BACKWARD,
    EXTENSIONS,
    FORWARD,
    belongs,
    is_extension,
    is_theirs,
)


class NoKernelError(RuntimeError):
    """A compiled module was called in a world without one."""


class World(Copies):
    """The surroundings of the code in a trial."""

    def __init__(self, *, card: bool = False, traced: bool = False, compiled_core: bool = True) -> None:
        super().__init__()
        self._card, self._traced, self._compiled_core = card, traced, compiled_core
        self.taken: set[str] = set()  # compiled functions that were taken as published
        self._torch = _Overlay(torch, self._staged())
        self._registry = registries.of_libreyolo(filled=card or not compiled_core, takes=compiled_core)

    def _staged(self) -> dict[str, Any]:
        staged: dict[str, Any] = dict(
            registries.of_tao(
                self._kernel(FORWARD, "torch.ops.nvidia"), self._kernel(BACKWARD, "torch.ops.nvidia")
            )
        )
        if self._card:
            staged["cuda.is_available"] = lambda: True
        if self._traced:
            for name in _TRACING:
                staged[name] = lambda *_: True
        return staged

    def _missing(self, name: str) -> dict[str, Any]:
        return {name: self._extension(None, name)} if name in EXTENSIONS else {}

    def _value(self, value: Any, name: str = "") -> Any:
        if value is torch:
            return self._torch
        if isinstance(value, FunctionType) and value.__module__ == registries.LIBREYOLO:
            return self._registry.get(value.__name__, value)
        if isinstance(value, FunctionType):
            staged = self._traced and value.__name__ in _TRACING_FUNCTIONS
            return (lambda *_, **__: True) if staged else self.function(value)
        if isinstance(value, functools.partial) and is_theirs(value.func):
            return functools.partial(self.function(value.func), *value.args, **value.keywords)
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            return self._autograd_function(value)
        if name in (FORWARD, BACKWARD):
            return self._kernel(name, name)
        if is_extension(name, value):
            return self._extension(value, name)
        return value

    def _autograd_function(self, kind: Any) -> Any:
        if not belongs(kind.__module__):
            return kind
        if id(kind) not in self._copies:
            own = {
                name: staticmethod(self.function(each.__func__))
                for name, each in vars(kind).items()
                if isinstance(each, staticmethod)
            }
            self._remember(
                kind, type(kind)(kind.__name__, kind.__bases__, {"__module__": kind.__module__, **own})
            )
        return self._copies[id(kind)]

    def _extension(self, value: Any, name: str) -> Any:
        kernels = {each: self._kernel(each, f"{name}.{each}") for each in (FORWARD, BACKWARD)}
        return _Overlay(types.SimpleNamespace() if value is None else value, kernels)

    def _kernel(self, which: str, name: str) -> Callable[..., Any]:
        published = _published_forward if which == FORWARD else _published_backward

        def kernel(*arguments: Any, **named: Any) -> Any:
            if not self._compiled_core:
                raise NoKernelError(f"{name} cannot run here")
            self.taken.add(name)
            return published(*arguments, **named)

        return kernel


_TRACING = (
    "compiler.is_compiling",
    "compiler.is_dynamo_compiling",
    "compiler.is_exporting",
    "jit.is_tracing",
    "jit.is_scripting",
    "onnx.is_in_onnx_export",
    "_dynamo.is_compiling",
)
_TRACING_FUNCTIONS = {name.rpartition(".")[2] for name in _TRACING} | {"is_torchdynamo_compiling"}


class _Overlay:
    """Another object with some dotted names replaced."""

    def __init__(self, under: Any, replaced: dict[str, Any]) -> None:
        self._under, self._replaced = under, replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        value = getattr(self._under, name)
        inner = {
            key[len(name) + 1 :]: each for key, each in self._replaced.items() if key.startswith(name + ".")
        }
        return _Overlay(value, inner) if inner else value


class OnCard(Tensor):
    """A tensor of the CPU that reports to be on a card, as its results do."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def _published_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, *_: Any, **__: Any
) -> Tensor:
    """The published kernel, in plain torch."""
    sizes = [(int(height), int(width)) for height, width in shapes]
    wide = [
        each.detach().to(torch.promote_types(each.dtype, torch.float32))
        for each in (value, locations, weights)
    ]
    return reference.ms_deform_attn_by_grid_sample(wide[0], sizes, *wide[1:]).to(value.dtype)


def _published_backward(*arguments: Any, **named: Any) -> Any:
    """The gradients of the published kernel: returned, or written if mmcv's form passes tensors for them."""
    value, shapes, starts, locations, weights, grad_output, *rest = arguments
    leaves = [
        each.detach().to(torch.promote_types(each.dtype, torch.float32)).requires_grad_()
        for each in (value, locations, weights)
    ]
    sizes = [(int(height), int(width)) for height, width in shapes]
    with torch.enable_grad():
        output = reference.ms_deform_attn_by_grid_sample(leaves[0], sizes, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
    gradients = tuple(each.to(like.dtype) for each, like in zip(gradients, (value, locations, weights)))
    written = [each for each in rest if isinstance(each, Tensor) and each.dim() > 0]
    for each, gradient in zip(written, gradients):
        each.copy_(gradient)
    return None if written else gradients
