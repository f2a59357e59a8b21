# SPDX-License-Identifier: Apache-2.0
"""``vitkern.install``: imports of a compiled deformable attention get this package's kernels instead."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import nn

from vitkern.compat import deformable_detr, forms, imports, mmcv, proofs, samples, tao
from vitkern.compat.table import Left, Table

_LAYER = "MultiScaleDeformableAttention"  # the class, if there is one
_MODULE = "compiled module"
_POSITIONAL = (deformable_detr.ms_deform_attn_forward, deformable_detr.ms_deform_attn_backward)


class Ecosystem(NamedTuple):
    """The imports of a project, and their replacements."""

    serves: str
    extension: str  # the compiled module
    functions: tuple[Callable[..., Any], ...] = _POSITIONAL  # the replaced functions
    home: str = ""  # the module that defines the class _LAYER
    importers: tuple[str, ...] = ()  # modules that do without the class if its import fails
    relatives: tuple[str, ...] = ()  # other ecosystems with the same functions

    @property
    def package(self) -> str:
        """The package of the compiled module, if any."""
        return self.extension.rpartition(".")[0]


ECOSYSTEMS = {
    "deformable_detr": Ecosystem(
        "Deformable-DETR, ViT-Adapter, Mask2Former, DINO and whoever compiles the same module",
        "MultiScaleDeformableAttention",
        relatives=("groundingdino", "detrex"),
    ),
    "groundingdino": Ecosystem(
        "GroundingDINO",
        "groundingdino._C",
        home="groundingdino.models.GroundingDINO.ms_deform_attn",
    ),
    "detrex": Ecosystem(
        "detrex",
        "detrex._C",
        home="detrex.layers.multi_scale_deform_attn",
    ),
    "mmcv": Ecosystem(
        "mmcv 1.x and 2.x, mmcv-lite, and with them mmdet and mmseg",
        "mmcv._ext",
        mmcv.EXTENSION,
        home="mmcv.ops.multi_scale_deform_attn",
        importers=("mmcv.cnn.bricks.transformer",),
    ),
}

_switched: list[Any] = []  # classes that have our forward

_lock = threading.RLock()
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Serialises calls: two at once would replace a forward that the other has just replaced."""

    @functools.wraps(function)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _lock:
            return function(*args, **kwargs)

    return locked


@_one_at_a_time
def install(name: str, *, override: bool = False) -> Table:
    """Makes later imports of a compiled deformable attention find this package's kernels.

    Args:
        name: ``"deformable_detr"``: the module ``MultiScaleDeformableAttention``, which Deformable-DETR, ViT-Adapter,
            Mask2Former, DINO and others compile, and the next two; ``"groundingdino"``: ``groundingdino._C``;
            ``"detrex"``: ``detrex._C``; ``"mmcv"``: ``mmcv._ext``, which mmcv-lite is without. In the last three, the
            class MultiScaleDeformableAttention also gets vitkern's ``forward``, for every device. ``"tao"``: the ops
            ``torch.ops.nvidia`` of NVIDIA TAO, whose layers then load no library of their own.
        override: also replaces an installed module; its other names stay available.

    Returns:
        A table of the replaced modules and classes; ``left`` has those that stay, and why.

    Raises:
        RuntimeError: the module is installed and there is no class to change instead, or it has already been imported;
            TAO's library is installed or loaded.

    Call it before the project is imported. A second call changes nothing; :func:`uninstall` undoes it.
    """
    if name == "tao":
        return tao.install(override=override)
    ecosystem = _ecosystem("install", name)
    override |= imports.comes_first(ecosystem.extension)
    installed = _installed(ecosystem.extension)
    if installed and not (override or ecosystem.home):
        raise RuntimeError(
            f"install: {ecosystem.extension} is {installed}. Uninstall that, "
            f"or call install({name!r}, override=True) to have vitkern's"
        )
    if installed and override and ecosystem.extension in sys.modules:
        raise RuntimeError(
            f"install: {ecosystem.extension} is {installed} and imported: call install({name!r}) earlier"
        )
    parts = [ecosystem, *map(ECOSYSTEMS.__getitem__, ecosystem.relatives)]
    for part in parts:
        _check_not_too_late(part)
    return switch(parts, override=override)


@_one_at_a_time
def uninstall(name: str | None = None) -> Table:
    """Undoes :func:`install`, for one name or for all. Names that were imported from our modules stay as they are.

    Returns:
        A table of the modules that were changed back: empty if there was nothing to undo.
    """
    if name == "tao":
        return Table(tao.uninstall())
    names = list(ECOSYSTEMS) if name is None else [name, *_ecosystem("uninstall", name).relatives]
    undone = tao.uninstall() if name is None else []
    for part in map(ECOSYSTEMS.__getitem__, names):
        modules = (part.extension, part.home)
        undone += [(module, "vitkern's", "as it was") for module in modules if imports.withdraw(module)]
        imports.withdraw(part.package)
        for layer in [layer for layer in _switched if layer.__module__ == part.home]:
            _switched.remove(layer)
            if forms.is_ours(layer.forward):  # it was not changed since
                layer.forward = layer.forward.replaces
    return Table(undone)


@_one_at_a_time
def switch(parts: list[Ecosystem], *, override: bool) -> Table:
    """Replaces modules of ecosystems on import. Only the first ecosystem's installed module may be overridden."""
    rows, left = [], []
    for part in parts:
        first = override and part is parts[0]
        installed = "" if first else _installed(part.extension)
        if installed:
            left.append(Left(part.extension, _MODULE, installed))
        else:
            imports.supply(part.extension, partial(_fill, part), first=first)
            rows.append((part.extension, _MODULE, "ms_deform_attn"))
        # A copy of the project may use the module without the package; this does not apply to mmcv's.
        if part.package and part.functions is _POSITIONAL:
            imports.supply(part.package, _stand_in, is_package=True)
        if part.home:
            imports.follow(part.home, partial(_give_forward, part))
            rows.append((part.home, _LAYER, "ms_deform_attn_fused"))
    return Table(rows, left)


def _ecosystem(caller: str, name: str) -> Ecosystem:
    if not isinstance(name, str) or name not in ECOSYSTEMS:
        serves = {key: ecosystem.serves for key, ecosystem in ECOSYSTEMS.items()} | {"tao": "NVIDIA TAO"}
        known = "; ".join(f"{key!r}: {each}" for key, each in serves.items())
        raise ValueError(f"{caller}: unknown name {name!r}: choose from {known}")
    return ECOSYSTEMS[name]


def _installed(extension: str) -> str:
    """The origin of a compiled module that is not ours, or nothing."""
    module = sys.modules.get(extension)
    if module is not None:
        origin = getattr(module, "__file__", "an unknown place")
        return "" if imports.is_ours(module) else f"installed, from {origin}"
    spec = imports.find_elsewhere(extension)
    return "" if spec is None else f"installed, from {spec.origin}"


def _check_not_too_late(part: Ecosystem) -> None:
    """Raises if a project has a dummy instead of the class, or none, because its compiled module was missing."""
    for name in (part.home, *part.importers):
        if name in sys.modules and not _is_layer(getattr(sys.modules[name], _LAYER, None)):
            raise RuntimeError(
                f"install: {name} was imported without {part.extension}, and without {_LAYER}: call install earlier"
            )


def _is_layer(layer: object) -> bool:
    return isinstance(layer, type) and issubclass(layer, nn.Module)


@_one_at_a_time
def _give_forward(part: Ecosystem, module: ModuleType) -> None:
    layer: Any = getattr(module, _LAYER, None)
    if not _is_layer(layer):
        raise ImportError(
            f"vitkern.install expects the class {_LAYER} in {part.home}, which has none in this version; "
            "vitkern.uninstall() leaves it as it is"
        )
    if forms.is_ours(layer.forward):
        return
    proof = proofs.proof_of(samples.mmcv(layer))
    if not proof.holds:  # an import must not fail because of this
        warnings.warn(
            f"vitkern.install leaves the forward of {part.home}.{_LAYER}: {proof.reason}", stacklevel=2
        )
        return
    _switched.append(layer)
    layer.forward = proofs.forward_on_trial(layer.forward)


def _stand_in(module: ModuleType) -> None:
    module.__doc__ = (
        "Stands in for a package that is not installed, so that one module of it can be imported."
    )


def _fill(part: Ecosystem, module: ModuleType) -> None:
    """Fills a stand-in for the compiled module: our functions, then the names of an installed one, or refusals."""
    theirs = imports.find_elsewhere(part.extension)
    others: list[ModuleType] = []

    def __getattr__(name: str) -> Any:  # noqa: N807  # what Python asks a module for names that it lacks
        if name.startswith("_"):
            raise AttributeError(f"module {part.extension!r} has no attribute {name!r}")
        if theirs is None:
            return _missing(part, name)
        if not others:
            others.append(_load(theirs))
        return getattr(others[0], name)

    module.__doc__ = f"{part.extension}, in place of which vitkern.install puts kernels of its own."
    vars(module).update({function.__name__: function for function in part.functions}, __getattr__=__getattr__)


def _load(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def _missing(part: Ecosystem, name: str) -> Callable[..., Any]:
    """A function that can be imported, because mmcv looks up all functions on import, but that raises if called."""

    def refuse(*_: Any, **__: Any) -> None:
        supplied = ", ".join(function.__name__ for function in part.functions)
        raise NotImplementedError(
            f"{part.extension}.{name} is not available: vitkern stands in for that module and has only {supplied}"
        )

    return refuse
