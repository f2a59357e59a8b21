# SPDX-License-Identifier: Apache-2.0
"""``vitkern.patch``: the kernels of this package in models that were built by other projects, and out of them again.

A layer of a built model gets another class, a subclass of its own whose forward calls the kernels: it stays the same
object, with its parameters, buffers, hooks and place in the model. All changes are prepared before the first is made.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from vitkern.compat import cores, forms, holders, modules, proofs, transformers
from vitkern.compat.proofs import Proof
from vitkern.compat.table import Left, Table
from vitkern.compat.trial.functions import belongs, subclass
from vitkern.nn import MSDeformAttn

# Libraries with parts of their own to patch: modules with `patch` and `unpatch`.
LIBRARIES = {"transformers": transformers}

Target = nn.Module | str

_lock = threading.RLock()  # two at once would patch a layer that the other has just patched


def patch(target: Target, *, strict: bool = False, dry_run: bool = False) -> Table:
    """Runs multi-scale deformable attention of a built model, or of a library, on this package's kernels.

    Args:
        target: a model of any project, wrapped or not. Its layers are found by the names of their children and
            arguments: those of Deformable-DETR, ViT-Adapter, DINO, Mask2Former, GroundingDINO, detrex, mmcv and
            transformers, and their copies. In layers of another form the function that samples is replaced, for this
            model alone. Or ``"transformers"``: all its models, those built before and those built later. Or an
            imported module, ``"package.module"``: its functions that sample, for the whole process.
        strict: raises if a layer has to be left, and changes nothing.
        dry_run: changes nothing; the table is the same.

    Returns:
        A table of the replaced layers, to be printed: empty if there was nothing, or nothing left to do.

    Raises:
        RuntimeError: with ``strict``, the reasons why layers are left.

    A layer is replaced only on proof: a copy of it with drawn weights runs beside the kernel, and outputs, gradients
    and calls of its children must agree under all conditions that its code tells apart. Weights are not read. A layer
    that fails stays, and the table says why. The tried code and configuration are compared before each call; if an
    attribute or a function has changed since, the original runs and a warning names it.

    Weights, ``state_dict``, hooks and optimizers stay valid. If anything fails, nothing has changed.
    ``vitkern.unpatch`` undoes it.

    Examples:
        >>> model = DeformableDetrForObjectDetection(config)
        >>> print(vitkern.patch(model))
    """
    with _lock:
        if isinstance(target, nn.Module):
            return _patch_model(target, strict=strict, dry_run=dry_run)
        table: Table = _library(target).patch(dry_run=dry_run)
        _refuse_left(table, strict)
        return table


def unpatch(target: Target) -> Table:
    """Undoes :func:`patch`, for the same model or library. Returns a table of the removed kernels."""
    with _lock:
        if isinstance(target, nn.Module):
            return _unpatch(_patched_modules(target))
        return _library(target).unpatch()


@contextmanager
def patched(target: Target) -> Iterator[Table]:
    """Patches inside a ``with`` block. Layers that were patched before stay patched after it."""
    with _lock:
        before = _patched_modules(target)
        table = patch(target)
        ours = [each for each in _patched_modules(target) if each not in before]
    try:
        yield table
    finally:
        with _lock:
            _unpatch(ours)  # the model may have lost or moved some of them meanwhile
            if table and not isinstance(target, nn.Module):
                unpatch(target)


def _library(name: object) -> Any:
    if isinstance(name, str) and name in LIBRARIES:
        return LIBRARIES[name]
    if isinstance(name, str) and name in sys.modules and belongs(name):
        return modules.Functions(name)
    names = " or ".join(map(repr, LIBRARIES))
    raise ValueError(
        f"vitkern.patch takes a torch.nn.Module or the name of a library, {names}, got {name!r}: "
        "of another project it takes imported modules, whose functions sample"
    )


def _patch_model(model: nn.Module, *, strict: bool, dry_run: bool) -> Table:
    plan, left, found = _plan(model)
    sampling, refused = _plan_cores(model, {id(module) for _, module, _ in plan})
    # A layer whose form is known has a reason already, unless the form is only that of its arguments.
    told = {each.path for each in left if "no form with these" not in each.reason}
    told -= {path for path, *_ in sampling}
    refused = [each for each in refused if each.path not in told]
    known = {path for path, *_ in sampling} | {each.path for each in refused}
    left = [each for each in left if each.path not in known] + refused
    found = found or bool(sampling or refused)
    rows = [(path, type(module).__name__, _kernel(proof)) for path, module, proof in plan]
    rows += [
        (f"{path}.{name}".lstrip("."), name, "ms_deform_attn")
        for path, _, _, names in sampling
        for name in names
    ]
    table = Table(rows, left, (name for _, _, proof in plan for name in proof.taken))
    _refuse_left(table, strict)
    if not found:
        warnings.warn(
            f"vitkern.patch found no multi-scale deformable attention in {type(model).__name__}", stacklevel=3
        )
    done: list[tuple[str, nn.Module]] = []
    try:
        for path, module, proof in () if dry_run else plan:
            _change_class(module, _patched_class(type(module), proof))
            done.append((path, module))
        for path, module, kind, _ in () if dry_run else sampling:
            _change_class(module, kind)
            done.append((path, module))
    except BaseException:
        _unpatch(done)
        raise
    return table


def _plan(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Proof]], list[Left], bool]:
    """The layers to replace with their proofs, those to leave, and whether there are any, replaced ones included."""
    plan: list[tuple[str, nn.Module, Proof]] = []
    left: list[Left] = []
    found = False
    cores: set[int] = set()  # of layers that will not call them
    for path, module in model.named_modules():
        found |= isinstance(module, MSDeformAttn) or hasattr(type(module), "patched_from")
        if isinstance(module, torch.jit.ScriptModule) or id(module) in cores or not _may_be_one(module):
            continue
        found = True
        if forms.is_ours(type(module).forward):
            continue
        reason = _obstacle(module)
        if reason is None:
            proof = proofs.proof_of(module)
            reason = proof.reason
            if reason is not None:
                transformers.refuse_unknown(type(module), reason)
        if reason is not None:
            left.append(Left(path, type(module).__name__, reason))
            continue
        plan.append((path, module, proof))
        cores.update(id(child) for child in module.children())
    return plan, left, found


def _plan_cores(
    model: nn.Module, planned: set[int]
) -> tuple[list[tuple[str, nn.Module, Any, list[str]]], list[Left]]:
    """Other layers whose code calls a core, with the class and the names; and those to leave.

    A layer of a known form that failed its trial may do more than the kernel: it keeps its code, except the core.
    """
    plan, left = [], []
    for path, module in model.named_modules():
        kind: Any = type(module)
        if id(module) in planned or not belongs(kind.__module__) or forms.is_ours(kind.forward):
            continue
        if hasattr(kind, "patched_from"):
            continue
        held = holders.held_by(module)
        tried = {core: cores.replacement_of(core) for _, core in held.cores()}
        reason = _obstacle(module) if tried else None
        # A function whose roles were guessed, and that failed, is none that samples.
        reasons = (each.proof.reason for core, each in tried.items() if core.roles)
        refused = next((each for each in reasons if each is not None), None)
        replaced = {core: each.function for core, each in tried.items() if each.proof.holds}
        if reason is None and replaced:
            try:
                made = holders.class_on_kernels(module, held, replaced, _reduce)
                names = [name for name, core in held.cores() if core in replaced]
                plan.append((path, module, made, names))
            except holders.NoCopyError as error:
                reason = str(error)
        if reason := reason or refused:
            left.append(Left(path, kind.__name__, reason))
    return plan, left


def _may_be_one(module: nn.Module) -> bool:
    return forms.is_such_a_layer(module) or forms.is_such_a_core(module)


def _kernel(proof: Proof) -> str:
    assert proof.candidate is not None
    return proof.candidate.form.kernel


def _refuse_left(table: Table, strict: bool) -> None:
    if strict and table.left:
        raise RuntimeError("vitkern.patch: " + "; ".join(map(str, table.left)))


def _obstacle(module: nn.Module) -> str | None:
    """Why the class of a layer must not be changed, or None."""
    if _has_forward_of_its_own(module):
        return "its forward was set on the layer itself: patch before whatever did that"
    if is_parametrized(module):  # this changes the class, and its undoing needs that class
        return "a tensor of its own is parametrized: patch before that"
    return None


def _has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether a forward was set on the layer. A temporary wrapper may leave the class's method there: that is none."""
    own = vars(module).get("forward")
    function = type(module).forward
    return own is not None and not (
        isinstance(own, MethodType) and own.__self__ is module and own.__func__ is function
    )


def _change_class(module: nn.Module, kind: Any) -> None:
    vars(module).pop("forward", None)  # the bound method of the class that it had
    module.__class__ = kind


def _make_patched_class(kind: Any, proof: Proof | None) -> Any:
    """The subclass for layers of this class. It keeps the name, because others look layers up by it.

    Without a proof its layers are tried at their first call.
    """
    original = proofs.original_of(kind)
    kernel = "trial" if proof is None else _kernel(proof)
    namespace = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "forward": proofs.forward_on_trial(original) if proof is None else proofs.forward_by(proof, kind),
        "extra_repr": lambda self: f"on vitkern.{kernel}",
        "patched_from": kind,
        "patched_by": proof,
    }
    return subclass(kind, namespace)


_patched_class: Callable[[Any, Proof | None], Any] = functools.cache(_make_patched_class)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """The pickle of a patched layer: its original class and its proof's name, as no file can name a class made here."""
    kind = type(module).patched_from  # type: ignore[attr-defined]
    proof = type(module).patched_by  # type: ignore[attr-defined]
    reduced: Any = super(type(module), module).__reduce_ex__(protocol)
    make, arguments, *state = reduced
    arguments = tuple(kind if each is type(module) else each for each in arguments)
    if (key := getattr(type(module), "cores_of", None)) is not None:
        return holders.remade, (kind, key, make, *arguments), *state
    return _remade, (kind, "" if proof is None else proof.name, make, *arguments), *state


def _remade(kind: Any, proof: str, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A copy of a patched layer: by its proof in the process that has it, elsewhere after a trial at its first call."""
    module = make(*arguments)
    if type(module) is kind and not forms.is_ours(kind.forward):
        module.__class__ = _patched_class(kind, proofs.named(proof, kind))
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
        proof = type(module).patched_by  # type: ignore[attr-defined]
        kernel = "ms_deform_attn" if hasattr(type(module), "cores_of") else "vitkern"
        kernel = kernel if proof is None else _kernel(proof)
        rows.append((path, f"{kind.__name__} on {kernel}", kind.__name__))
        _change_class(module, kind)
    return Table(rows, left)
