# SPDX-License-Identifier: Apache-2.0
"""The results of trials, kept for the process: a proof holds for the code and the configuration that were tried.

Before each call of a replaced layer both are compared with their earlier state. If one has changed, the original runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import threading
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.compat.scopes import looked_at, scopes_of
from vitkern.compat.trial.coverage import DEVICES
from vitkern.compat.trial.functions import is_applied, is_core, undone
from vitkern.compat.trial.judge import Judgement, judge
from vitkern.compat.trial.specimen import is_plain

Function = Callable[..., Any]

_lock = threading.RLock()
_proofs: dict[tuple[type, Function], list[Proof]] = {}


class Proof:
    """The result of a trial of code and a configuration: a kernel that does the same, or why there is none."""

    def __init__(self, layer: nn.Module, judgement: Judgement) -> None:
        self.name = uuid.uuid4().hex  # a number would be that of another proof in another process
        self.reason = judgement.reason
        self.taken = judgement.taken
        self.candidate = judgement.candidate
        attributes = dict(judgement.attributes) if self.holds else _all_plain(layer)
        self.attributes = {
            name: copy.deepcopy(each) if isinstance(each, (list, dict, set)) else each
            for name, each in attributes.items()
        }
        self._names = tuple(attributes)
        self._pick = operator.itemgetter(*self._names) if attributes else None
        self._expected = self._pick(self.attributes) if self._pick else None
        self.functions = judgement.functions
        self._scopes = list(scopes_of(layer, judgement))
        self._scopes += [scope for proof in judgement.proved for scope in proof._scopes]
        self._follow()
        self._absent = tuple((scope.space, name) for scope in self._scopes for name in scope.absent)
        self._inherited = {
            name: getattr(type(layer), name)
            for scope in self._scopes
            if isinstance(scope.owner, type) and scope.owner in type(layer).__mro__
            for name in scope.values.keys() & judgement.reads
        }
        children = layer._modules.items()
        self._cores = tuple(
            (name, type(child)) for name, child in children if child is not None and is_core(child)
        )
        self._missing = tuple(name for name, child in children if child is None)
        # A kernel calls any child that the layer has; a refusal may have been because of one of them.
        self._children = None if self.holds else {name: type(child) for name, child in children}
        self._codes = tuple((each, each.__code__) for each in judgement.functions)
        self._warned: set[str] = set()
        if self.candidate is not None:
            self._prepare(type(layer), judgement)

    def _prepare(self, kind: type[nn.Module], judgement: Judgement) -> None:
        assert self.candidate is not None
        form, roles, sizes = self.candidate
        function = original_of(kind)
        self._forward = form.forward
        self._arguments = tuple(inspect.signature(function).parameters)[1:]
        self._known = frozenset(roles)
        self._looked_at = looked_at(function)
        by_role = {role: name for name, role in roles.items()}
        self._points, self._mask = by_role.get("points"), by_role.get("mask", "")
        self._value = by_role["value"]
        self._kinds, self._takes_mask = judgement.kinds, judgement.takes_mask
        if sizes.levels == 1:  # a single level's reference point is one for all levels
            self._kinds |= {(boxes, True) for boxes, _ in judgement.kinds}

    @property
    def holds(self) -> bool:
        return self.reason is None

    def changed(self, layer: nn.Module) -> str | None:
        """The name of an attribute or function that has changed since the trial, or None."""
        if torch.compiler.is_compiling():
            return self._changed_while_compiling(layer)
        try:
            own = layer.__dict__
            if self._pick is not None and self._pick(own) != self._expected:
                return next(name for name in self._names if own[name] != self.attributes[name])
            for pick, space, expected in self._quick:
                if pick(space) != expected and (name := self._changed_scope()):
                    return name
        except KeyError as error:
            return str(error.args[0])
        for space, name in self._absent:
            if name in space:
                return name
        for name in self._inherited:
            if name in own:
                return name
        for function, code in self._codes:
            if function.__code__ is not code:
                return function.__name__
        if self._children is not None:
            now = {name: type(child) for name, child in layer._modules.items()}
            return None if now == self._children else "children"
        return self._changed_child(layer) if self._missing or self._cores else None

    def _changed_scope(self) -> str | None:
        """The first name of a scope with another value, unless this package has changed it."""
        for scope in self._scopes:
            if name := scope.changed():
                return name
        self._follow()
        return None

    def _follow(self) -> None:
        """Keeps the values of all scopes for the checks of each call."""
        self._quick = tuple((scope.pick, scope.space, scope.expected) for scope in self._scopes)
        modules = [scope for scope in self._scopes if not isinstance(scope.owner, type)]
        held = [(scope.owner, name, value) for scope in modules for name, value in scope.values.items()]
        # Dynamo cannot compare autograd functions, except by their ids.
        self._applied = tuple((owner, name, id(value)) for owner, name, value in held if is_applied(value))
        self._plain = tuple(each for each in held if not is_applied(each[2]))

    def _changed_child(self, layer: nn.Module) -> str | None:
        children = layer._modules
        for name in self._missing:
            if children.get(name) is not None:
                return name
        for name, kind in self._cores:
            core: Any = children.get(name)
            hooked = core is not None and (
                core._forward_hooks or core._forward_pre_hooks or core._backward_hooks
            )
            if type(core) is not kind or hooked or "forward" in core.__dict__:
                return name
        return None

    def _changed_while_compiling(self, layer: nn.Module) -> str | None:
        """The same checks in code that dynamo follows and turns into guards."""
        for name, value in self.attributes.items():
            if getattr(layer, name) != value:
                return name
        for owner, name, value in self._plain:
            if owner.get(name) is not value:
                return name
        for owner, name, number in self._applied:
            if id(owner.get(name)) != number:
                return name
        for name, value in self._inherited.items():
            if not callable(value) and getattr(layer, name) != value:
                return name
        for name in self._missing:
            if getattr(layer, name) is not None:
                return name
        return None

    def run(self, layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The kernel's result, or NotImplemented for calls that no trial has covered."""
        if len(positional) > len(self._arguments):
            return NotImplemented
        given = dict(zip(self._arguments, positional))
        for name in named:
            if name in given:
                return NotImplemented
        given.update(named)
        if not given.keys() <= self._known:
            if not self._ignores(given):
                return NotImplemented
            given = {name: value for name, value in given.items() if name in self._known}
        if not self._covers(given):
            return NotImplemented
        return self._forward(layer, **given)

    def _ignores(self, given: dict[str, Any]) -> bool:
        """Whether the original ignores the arguments that have no role."""
        others = given.keys() - self._known
        return self._looked_at is not None and others.isdisjoint({*self._arguments, *self._looked_at})

    def _covers(self, given: dict[str, Any]) -> bool:
        if self._points is None:
            value = given.get(self._value)
            return not isinstance(value, Tensor) or value.device.type in DEVICES
        mask = given.get(self._mask)
        is_tried = self._takes_mask and isinstance(mask, Tensor) and mask.dtype == torch.bool
        if mask is not None and not is_tried:
            return False
        points = given.get(self._points)
        if not isinstance(points, Tensor) or points.dim() != 4 or not points.is_floating_point():
            return False
        if points.shape[3] not in (2, 4) or points.device.type not in DEVICES:
            return False
        boxes, one = points.shape[3] == 4, points.shape[2] == 1
        return (boxes, one) in self._kinds

    def warn(self, layer: nn.Module, what: str = "") -> None:
        """Warns once that a layer's own forward runs: because of a change, or else because of the trial's result."""
        if what in self._warned:
            return
        self._warned.add(what)
        reason = self.reason
        if what:
            reason = (
                f"{what!r} has changed since the kernel was tried. Unpatch and patch to have it tried again"
            )
        warnings.warn(f"vitkern: {type(layer).__name__} runs its own forward: {reason}", stacklevel=4)


def _all_plain(layer: nn.Module) -> dict[str, Any]:
    skipped = set(vars(nn.Module()))
    return {name: each for name, each in vars(layer).items() if name not in skipped and is_plain(each)}


def original_of(kind: Any) -> Function:
    """The class's forward, without ours."""
    found: Function = undone(kind.forward)
    return found


def proof_of(layer: nn.Module, kind: type[nn.Module] | None = None) -> Proof:
    """The proof for a layer in its present state: a known one, or the result of a new trial."""
    kind = kind or type(layer)
    key = (kind, original_of(kind))
    known = known_proof(layer, kind)
    if known is not None:
        return known
    with _lock:
        known = known_proof(layer, kind)
        if known is None:
            known = Proof(layer, judge(layer, kind))
            _proofs.setdefault(key, []).append(known)
    return known


def known_proof(layer: nn.Module, kind: Any) -> Proof | None:
    for proof in _proofs.get((kind, original_of(kind)), ()):
        if proof.changed(layer) is None:
            return proof
    return None


def named(name: str, kind: Any) -> Proof | None:
    """A proof of this process, by its name, for layers of this class and its present code."""
    return next((proof for proof in _proofs.get((kind, original_of(kind)), ()) if proof.name == name), None)


def forward_by(proof: Proof, kind: Any) -> Function:
    """The forward for layers of a class with a proof. If the proof does not hold, the class's current forward runs."""
    original = original_of(kind)

    @functools.wraps(original)
    def forward(self: nn.Module, *positional: Any, **named: Any) -> Any:
        what = proof.changed(self)
        if what is None:
            output = proof.run(self, positional, named)
            if output is not NotImplemented:
                return output
        elif not torch.compiler.is_compiling():
            proof.warn(self, what)
        return kind.forward(self, *positional, **named)

    forward.replaces = original  # type: ignore[attr-defined]
    return forward


def forward_on_trial(original: Function) -> Function:
    """The forward of a class whose layers are tried at their first call."""

    @functools.wraps(original)
    def forward(self: nn.Module, *positional: Any, **named: Any) -> Any:
        kind = _kind_of(self)
        if original_of(kind) is not original:  # a subclass calls the forward that it overrides
            return original(self, *positional, **named)
        proof = known_proof(self, kind)
        if proof is None and not _is_recorded():
            proof = proof_of(self, kind)
            if not proof.holds:
                proof.warn(self)
        if proof is not None and proof.holds:
            output = proof.run(self, positional, named)
            if output is not NotImplemented:
                return output
        return original(self, *positional, **named)

    forward.replaces = original  # type: ignore[attr-defined]
    return forward


def _kind_of(layer: nn.Module) -> Any:
    return getattr(type(layer), "patched_from", type(layer))


def _is_recorded() -> bool:
    """Whether a compiler, an exporter or a graph records the call, so that no trial can run."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
