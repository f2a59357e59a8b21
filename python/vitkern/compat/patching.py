# SPDX-License-Identifier: Apache-2.0
"""``vitkern.patch``: the kernels of this package in models that were built by other projects, and out of them again.

A layer of a built model gets another class, a subclass of its own whose forward calls the kernels: it stays the same
object, with its parameters, buffers, hooks and place in the model. Everything is worked out before anything changes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from vitkern.compat import forms, transformers
from vitkern.compat.table import Left, Table

# What has parts of its own to patch: a module with `patch` and `unpatch`.
LIBRARIES = {"transformers": transformers}

Target = nn.Module | str

_lock = threading.RLock()  # two at once would patch what the other has just patched


def patch(target: Target) -> Table:
    """Run multi-scale deformable attention of a built model, or of a library, on this package's kernels.

    Args:
        target: a model of any project, wrapped or not, whose layers are known by their code: those of Deformable-DETR,
            ViT-Adapter, DINO, Mask2Former, GroundingDINO, detrex, mmcv and transformers, and their copies. Or
            ``"transformers"``: all its models, those built before and those built later.

    Returns:
        A table of what was replaced, to be printed: empty where there was nothing, or nothing left to do.

    Weights, ``state_dict``, hooks and optimizers stay valid. A layer that cannot be replaced stays, and the table says
    why. If anything fails, nothing has changed. ``vitkern.unpatch`` undoes it.

    Examples:
        >>> model = DeformableDetrForObjectDetection(config)
        >>> print(vitkern.patch(model))
    """
    with _lock:
        return _patch_model(target) if isinstance(target, nn.Module) else _library(target).patch()


def unpatch(target: Target) -> Table:
    """Undo :func:`patch`, for the same model or library. Returns a table of what was taken out."""
    with _lock:
        if isinstance(target, nn.Module):
            return _unpatch(_patched_modules(target))
        return _library(target).unpatch()


@contextmanager
def patched(target: Target) -> Iterator[Table]:
    """Patched inside a ``with`` block. What was patched before stays patched after."""
    with _lock:
        before = _patched_modules(target)
        table = patch(target)
        ours = [each for each in _patched_modules(target) if each not in before]
    try:
        yield table
    finally:
        with _lock:
            _unpatch(ours)  # which the model may have lost meanwhile, or moved
            if table and not isinstance(target, nn.Module):
                unpatch(target)


def _library(name: object) -> Any:
    if not isinstance(name, str) or name not in LIBRARIES:
        names = " or ".join(map(repr, LIBRARIES))
        raise ValueError(
            f"vitkern.patch takes a torch.nn.Module or the name of a library, {names}, got {name!r}"
        )
    return LIBRARIES[name]


def _patch_model(model: nn.Module) -> Table:
    plan: list[tuple[str, nn.Module, forms.Form]] = []
    left: list[Left] = []
    cores: set[int] = set()  # of layers that will not call them
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or id(module) in cores:
            continue
        function = type(module).forward
        if forms.is_ours(function):
            continue
        form = forms.form_of(function)
        if form is None and not forms.is_such_a_layer(module):
            continue
        reason = _objection(module, form)
        if form is None or reason is not None:
            left.append(Left(path, type(module).__name__, reason or ""))
            continue
        plan.append((path, module, form))
        cores.add(id(getattr(module, form.core or "", None)))

    done: list[tuple[str, nn.Module]] = []
    table = Table([(path, type(module).__name__, form.kernel) for path, module, form in plan], left)
    try:
        for path, module, _ in plan:
            _change_class(module, _patched_class(type(module)))
            done.append((path, module))
    except BaseException:
        _unpatch(done)
        raise
    return table


def _objection(module: nn.Module, form: forms.Form | None) -> str | None:
    """None if a layer can be replaced, else why not. Raises where the code of a library is not the one known here."""
    kind = type(module)
    if form is None:
        reason = forms.difference(kind.forward)
        transformers.refuse_unknown(kind, reason)
        return reason
    if _has_forward_of_its_own(module):
        return "its forward was set on the layer itself: patch before whatever did that"
    if is_parametrized(module):  # which changes the class, and undone it looks for what it put there
        return "a tensor of its own is parametrized: patch before that"
    return form.objection_to_core(module, kind.forward)


def _has_forward_of_its_own(module: nn.Module) -> bool:
    """Who wraps the forward of a layer for a while may leave its own method behind in its attributes: that is none."""
    own = vars(module).get("forward")
    function = type(module).forward
    return own is not None and not (
        isinstance(own, MethodType) and own.__self__ is module and own.__func__ is function
    )


def _change_class(module: nn.Module, kind: Any) -> None:
    vars(module).pop("forward", None)  # the bound method of the class that it had
    module.__class__ = kind


def _make_patched_class(kind: Any) -> Any:
    """The subclass that a layer of this class becomes. It keeps the name, by which others look layers up."""
    form = forms.form_of(kind.forward)
    assert form is not None
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "forward": forms.replacing(kind.forward, form.forward),
        "extra_repr": lambda self: f"on vitkern.{form.kernel}",
        "patched_from": kind,
    }
    return type(kind)(kind.__name__, (kind,), namespace)


_patched_class: Callable[[Any], Any] = functools.cache(_make_patched_class)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickled as the class that it comes from and the wish to be patched: no file can name a class made on the fly."""
    kind = type(module).patched_from  # type: ignore[attr-defined]
    reduced: Any = super(type(module), module).__reduce_ex__(protocol)
    make, arguments, *state = reduced
    return _remade, (kind, make, *(kind if each is type(module) else each for each in arguments)), *state


def _remade(kind: Any, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A layer out of a pickle: patched if its class still is what it was, else as the library has it by now."""
    module = make(*arguments)
    if type(module) is kind and forms.form_of(kind.forward) is not None and not forms.is_ours(kind.forward):
        module.__class__ = _patched_class(kind)
    return module


def _patched_modules(target: Target) -> list[tuple[str, nn.Module]]:
    if not isinstance(target, nn.Module):
        return []
    return [
        (path, module) for path, module in target.named_modules() if hasattr(type(module), "patched_from")
    ]


def _unpatch(modules: list[tuple[str, nn.Module]]) -> Table:
    rows, left = [], []
    for path, module in modules:
        kind = getattr(type(module), "patched_from", None)
        if kind is None:
            continue
        reason = ""
        if "patched_from" not in vars(type(module)):
            reason = "its class was made from the patched one (fully_shard, parametrize): undo that first"
        elif _has_forward_of_its_own(module):
            reason = "its forward was set on the layer itself: undo that first"
        if reason:
            left.append(Left(path, type(module).__name__, reason))
            continue
        form = forms.form_of(kind.forward)
        rows.append((path, f"{kind.__name__} on {form.kernel if form else 'vitkern'}", kind.__name__))
        _change_class(module, kind)
    return Table(rows, left)
