# SPDX-License-Identifier: Apache-2.0
"""Functions of other projects that sample. They are tried like layers; ``holders`` replaces them in their callers."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkern.compat import forms, layers
from vitkern.compat.proofs import Proof
from vitkern.compat.table import Left, Table
from vitkern.compat.trial import functions
from vitkern.compat.trial.inputs import Sizes
from vitkern.compat.trial.judge import judge

Function = Callable[..., Any]

_ROLES = {
    "value": "value value_list values",
    "shapes": "value_spatial_shapes spatial_shapes input_spatial_shapes shapes",
    "locations": "sampling_locations locations sampling_loc",
    "weights": "attention_weights attn_weights attn_weight weights",
    "points_list": "num_points_list points_list",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_METHODS = ("method", "mode")  # the names of the argument for the sampling method


class Core(NamedTuple):
    """A function that may sample, and the arguments that a partial fixes."""

    function: FunctionType
    fixed: tuple[tuple[str, Any], ...] = ()

    @property
    def roles(self) -> dict[str, str]:
        """The roles of its arguments, by name."""
        names = inspect.signature(self.function).parameters
        return {name: _ROLE_OF[name] for name in names if name in _ROLE_OF}


def core_of(value: Any) -> Core | None:
    """The core that a value is by the names of its arguments: a function, or a partial of one with plain values."""
    value = functions.undone(value)
    fixed: dict[str, Any] = {}
    if isinstance(value, functools.partial) and not value.args:
        value, fixed = functions.undone(value.func), dict(value.keywords)
    if not functions.is_theirs(value) or not all(isinstance(each, (str, int)) for each in fixed.values()):
        return None
    core = Core(value, tuple(sorted(fixed.items())))
    found = set(core.roles.values())
    is_one = {"value", "shapes", "locations", "weights"} <= found and len(found) == len(core.roles)
    first = next(iter(inspect.signature(value).parameters), "self")
    return core if is_one and first != "self" else None


class Replacement(NamedTuple):
    """A core and its replacement."""

    proof: Proof
    function: Function


_known: dict[tuple[Core, CodeType], Replacement] = {}
_lock = threading.RLock()


def replacement_of(core: Core) -> Replacement:
    """The replacement of a core after a trial, which runs once per process."""
    key = (core, core.function.__code__)
    with _lock:
        if key not in _known:
            _known[key] = _tried(core)
    return _known[key]


def _tried(core: Core) -> Replacement:
    proofs = []
    for channels_first in (False, True):
        module = _as_layer(core, channels_first)
        proof = Proof(module, judge(module, known=(_form(core, channels_first),)))
        proofs.append(proof)
        if proof.holds:
            return Replacement(proof, _sampling(core, module, proof, channels_first))
    return Replacement(proofs[0], core.function)


def _form(core: Core, channels_first: bool) -> forms.Form:
    """The form of this one function."""
    roles = core.roles
    names = {role: name for name, role in roles.items()}
    forward = functools.partial(layers.sampling, names, channels_first, _method(core))
    ragged = "points_list" in names

    def sizes(module: nn.Module, _: Any) -> Sizes:
        """Sizes larger than any small number that the code names."""
        above = functions.largest_constant(functions.reachable(module, type(module)))
        many = max(3, min(above + 1, 8))
        points = (1, 3, 2, *[many] * (many - 2)) if ragged else (many,) * (many + 1)
        return Sizes(many, points, query=0, value=many + 2, reach=1.0, scaled=False)

    return forms.Form("core", forward, "ms_deform_attn", roles, sizes, is_core=True)


def _method(core: Core) -> str:
    """The sampling method, from the argument's value: "default" is bilinear."""
    given = inspect.signature(core.function).parameters
    found = (dict(core.fixed).get(name, given[name].default) for name in _METHODS if name in given)
    return "discrete" if next(found, "") == "discrete" else "default"


def _as_layer(core: Core, channels_first: bool) -> nn.Module:
    """A module whose forward is the function; it passes a list of levels if the function needs one."""
    function, fixed = core.function, dict(core.fixed)
    names = {role: name for name, role in core.roles.items()}

    @functools.wraps(function)
    def forward(self: nn.Module, **given: Any) -> Any:
        if channels_first:
            counts = [int(height) * int(width) for height, width in given[names["shapes"]]]
            value: Tensor = given[names["value"]].permute(0, 2, 3, 1)
            given[names["value"]] = list(value.split(counts, -1))
        return function(**fixed, **given)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(function)
    left = [each for each in signature.parameters.values() if each.name not in fixed]
    forward.__signature__ = signature.replace(parameters=[itself, *left])  # type: ignore[attr-defined]
    forward.samples = core  # type: ignore[attr-defined]
    kind = type(function.__name__, (nn.Module,), {"__module__": function.__module__, "forward": forward})
    module: nn.Module = kind()
    if _method(core) == "discrete":
        vars(module)["method"] = "discrete"
    return module


def _sampling(core: Core, module: nn.Module, proof: Proof, channels_first: bool) -> Function:
    """The function on the kernel; the original runs after changes, and for calls that no trial has covered."""
    original = functools.partial(core.function, **dict(core.fixed)) if core.fixed else core.function

    name = next(each for each, role in core.roles.items() if role == "value")
    index = [
        each for each in inspect.signature(core.function).parameters if each not in dict(core.fixed)
    ].index(name)

    @functools.wraps(core.function)
    def sample(*positional: Any, **named: Any) -> Any:
        value = positional[index] if len(positional) > index else named.get(name)
        if isinstance(value, Tensor) == channels_first:  # a list instead of a tensor, or the other way round
            return original(*positional, **named)
        what = proof.changed(module)
        if what is None:
            output = proof.run(module, positional, named)
            if output is not NotImplemented:
                return output
        elif not torch.compiler.is_compiling():
            proof.warn(module, what)
        return original(*positional, **named)

    sample.replaces = original  # type: ignore[attr-defined]
    sample.samples = core  # type: ignore[attr-defined]
    return sample


class Functions:
    """The cores of an imported module of a project, replaced for the whole process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _places(self) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
        """Each name for a core of this module in a module of the same project."""
        own = {id(functions.undone(each)) for each in vars(sys.modules[self._name]).values() if core_of(each)}
        project = self._name.partition(".")[0]
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] == project and isinstance(module, ModuleType):
                for key, value in list(vars(module).items()):
                    if id(functions.undone(value)) in own:
                        yield f"{name}.{key}", vars(module), key, value

    def patch(self, *, dry_run: bool = False) -> Table:
        rows, left = [], []
        for path, scope, key, value in self._places():
            core = None if hasattr(value, "samples") else core_of(value)
            if core is None:
                continue
            proof, function = replacement_of(core)
            if proof.reason is not None:
                left.append(Left(path, key, proof.reason))
                continue
            rows.append((path, f"{key}, for the whole process", "ms_deform_attn"))
            if not dry_run:
                scope[key] = function
        if not rows and not left and not any(hasattr(value, "samples") for _, _, _, value in self._places()):
            warnings.warn(f"vitkern.patch found no function that samples in {self._name}", stacklevel=3)
        return Table(rows, left)

    def unpatch(self) -> Table:
        rows = []
        for path, scope, key, value in self._places():
            if hasattr(value, "samples"):
                scope[key] = value.replaces
                rows.append((path, f"{key} on ms_deform_attn", key))
        return Table(rows)
