# SPDX-License-Identifier: Apache-2.0
"""Functions of other projects that sample. They are tried like layers; ``holders`` replaces them in their callers."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkern.compat import forms, layers
from vitkern.compat.proofs import Proof
from vitkern.compat.trial import functions
from vitkern.compat.trial.inputs import Sizes
from vitkern.compat.trial.judge import Judgement, judge
from vitkern.compat.trial.purity import names_of

Function = Callable[..., Any]
Roles = dict[str, str]  # of arguments, by name

_NAMES = {
    "value": "value value_list values",
    "shapes": "value_spatial_shapes spatial_shapes input_spatial_shapes value_shapes shapes",
    "shapes_list": "value_spatial_shapes_hw spatial_shapes_hw input_spatial_shapes_hw",
    "starts": "value_level_start_index input_level_start_index level_start_index starts",
    "locations": "sampling_locations locations sampling_loc",
    "weights": "attention_weights attn_weights attn_weight weights",
    "points_list": "num_points_list points_list",
    "step": "im2col_step",
}
_ROLE_OF = {name: role for role, names in _NAMES.items() for name in names.split()}
_NEEDED = {"value", "shapes", "locations", "weights"}
# The roles of arguments whose names say nothing, by their order.
_ORDERS = (
    ("value", "shapes", "locations", "weights"),
    ("value", "shapes", "starts", "locations", "weights"),
    ("value", "shapes", "locations", "weights", "points_list"),
    ("value", "shapes", "starts", "locations", "weights", "step"),
)
_SAMPLERS = {"grid_sample", "grid_sampler", functions.FORWARD}
_METHODS = ("method", "mode")  # the names of the argument for the sampling method
# Whether the locations have one axis for levels and points, and whether the weights do.
_WAYS = ((False, False), (True, True), (False, True))


class Core(NamedTuple):
    """A function that may sample, or an autograd function, and the arguments that a partial fixes."""

    function: FunctionType
    fixed: tuple[tuple[str, Any], ...] = ()
    applied: type | None = None  # the class whose `apply` is called; `function` is its forward

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Its arguments, without the context of an autograd function."""
        named = inspect.signature(self.function).parameters
        first = 1 if self.applied is not None and "apply" not in vars(self.applied) else 0
        return dict(list(named.items())[first:])

    @property
    def called(self) -> Function:
        """The original, to be called."""
        if self.applied is not None:
            original: Function = self.applied.apply  # type: ignore[attr-defined]
            return original
        return functools.partial(self.function, **dict(self.fixed)) if self.fixed else self.function

    @property
    def roles(self) -> Roles:
        """The roles of its arguments by their names; none if these say too little."""
        named = {name: _ROLE_OF[name] for name in self.parameters if name in _ROLE_OF}
        found = set(named.values())
        return named if found >= _NEEDED and len(found) == len(named) else {}

    def readings(self) -> Iterator[Roles]:
        """The roles that its arguments may have: by their names, or else by their order if the code samples."""
        if self.roles:
            yield self.roles
        elif self.applied is not None or _samples(self.function):
            given = [
                name for name, each in self.parameters.items() if each.default is inspect.Parameter.empty
            ]
            yield from (dict(zip(given, order)) for order in _ORDERS if len(order) == len(given))


def _samples(function: Any) -> bool:
    """Whether a function samples, or calls one of its project that does."""
    scope = function.__globals__
    called: list[Any] = [functions.undone(scope.get(name)) for name in names_of(function.__code__)]
    codes = [function.__code__, *(each.__code__ for each in called if functions.is_theirs(each))]
    return any(functions.names_in(code) & _SAMPLERS for code in codes)


def core_of(value: Any) -> Core | None:
    """The core for a value with fitting arguments: a function, a partial with plain values, or a class with `apply`."""
    core = _applied(value) if isinstance(value, type) else _plain(functions.undone(value))
    if core is None or next(iter(core.parameters), "self") == "self":
        return None
    return core if next(core.readings(), None) is not None else None


def _plain(value: Any) -> Core | None:
    fixed: dict[str, Any] = {}
    if isinstance(value, functools.partial) and not value.args:
        value, fixed = functions.undone(value.func), dict(value.keywords)
    if not functions.is_theirs(value) or not all(isinstance(each, (str, int)) for each in fixed.values()):
        return None
    return Core(value, tuple(sorted(fixed.items())))


def _applied(value: type) -> Core | None:
    """A class with `apply`: an autograd function, or a class in place of one."""
    value = functions.undone(value)
    name = "forward" if issubclass(value, torch.autograd.Function) else "apply"
    function = vars(value).get(name)
    if not functions.belongs(value.__module__) or not isinstance(function, staticmethod):
        return None
    plain = inspect.unwrap(function.__func__)
    return Core(plain, applied=value) if functions.is_theirs(plain) else None


class Replacement(NamedTuple):
    """A core and its replacement."""

    layer: nn.Module  # that was tried
    proof: Proof
    function: Any  # called in the core's place; a class with `apply` in place of a class


_known: dict[tuple[Core, CodeType], Replacement] = {}
_lock = threading.RLock()


def replacement_of(core: Core) -> Replacement:
    """The replacement of a core after a trial, which runs once as long as the code and all that it names stay."""
    key = (core, core.function.__code__)
    with _lock:
        known = _known.get(key)
        if known is None or known.proof.changed(known.layer) is not None:
            _known[key] = _tried(core)
    return _known[key]


def _tried(core: Core) -> Replacement:
    refusals = []
    for roles in core.readings():
        for layout in layers.LAYOUTS:
            module = _as_layer(core, roles, layout)
            judgement = _refused(core) or judge(module, known=(_form(core, roles),))
            proof = Proof(module, judgement)
            if proof.holds:
                return Replacement(module, proof, _sampling(core, module, proof, judgement, layout))
            refusals.append((module, proof))
    # The code was read to its end where it ran: that says more than an exception.
    ran = [each for each in refusals if "raises in a trial" not in str(each[1].reason)]
    return Replacement(*(ran or refusals)[0], core.applied or core.function)


def _refused(core: Core) -> Judgement | None:
    """The judgement on an autograd function whose decorator no CPU shows, else None."""
    forward = vars(core.applied).get("forward") if core.applied is not None else None
    kind = functions.cast_under_autocast(getattr(forward, "__func__", None))
    return (
        None
        if kind is None
        else Judgement(f"its inputs become {kind} under autocast, which a CPU does not show")
    )


def _form(core: Core, roles: Roles) -> forms.Form:
    """The form of this one function."""
    names = {role: name for name, role in roles.items()}
    forward = functools.partial(layers.sampling, names, _method(core))
    ragged = "points_list" in names

    def sizes(module: nn.Module, _: Any) -> Sizes:
        """Sizes larger than any small number that the code names."""
        above = functions.largest_constant(functions.reachable(module, type(module)))
        many = max(3, min(above + 1, 8))
        points = (1, 3, 2, *[many] * (many - 2)) if ragged else (many,) * (many + 1)
        return Sizes(many, points, query=0, value=many + 2, reach=1.0, scaled=False)

    ways = _WAYS[1:2] if ragged else _WAYS
    return forms.Form("core", forward, "ms_deform_attn", roles, sizes, is_core=True, ways=ways)


def _method(core: Core) -> str:
    """The sampling method, from the argument's value: "default" is bilinear."""
    given = core.parameters
    found = (dict(core.fixed).get(name, given[name].default) for name in _METHODS if name in given)
    return "discrete" if next(found, "") == "discrete" else "default"


def _as_layer(core: Core, roles: Roles, layout: str) -> nn.Module:
    """A module whose forward is the function; it passes the value in this layout."""
    function, applied, fixed = core.function, core.applied, dict(core.fixed)
    names = {role: name for name, role in roles.items()}
    order = [name for name in core.parameters if name not in fixed]

    def forward(self: nn.Module, **given: Any) -> Any:
        if layout != "pixels":
            value: Tensor = given[names["value"]].permute(0, 2, 3, 1).contiguous()
            given[names["value"]] = _arranged(value, given[names["shapes"]], layout)
        if applied is not None:  # takes no names
            return applied.apply(*(given[name] for name in order if name in given))  # type: ignore[attr-defined]
        return function(**fixed, **given)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    left = [core.parameters[name] for name in order]
    forward.__wrapped__ = function  # type: ignore[attr-defined]
    forward.__signature__ = inspect.Signature([itself, *left])  # type: ignore[attr-defined]
    forward.samples = core  # type: ignore[attr-defined]
    named = applied or function
    kind = type(named.__name__, (nn.Module,), {"__module__": named.__module__, "forward": forward})
    module: nn.Module = kind()
    if _method(core) == "discrete":
        vars(module)["method"] = "discrete"
    return module


def _arranged(value: Tensor, shapes: Any, layout: str) -> Any:
    """A value [B, M, D, S] in another layout."""
    if layout == "channels":
        return value
    sizes = [(int(height), int(width)) for height, width in shapes]
    levels = value.split([height * width for height, width in sizes], -1)
    if layout == "maps":
        return [each.flatten(0, 1).unflatten(-1, size).contiguous() for each, size in zip(levels, sizes)]
    return list(levels)


def _sampling(core: Core, module: nn.Module, proof: Proof, judgement: Judgement, layout: str) -> Any:
    """The function on the kernel; the original runs after changes, and for calls that no trial has covered."""
    original, kinds, lists = core.called, judgement.kinds, judgement.takes_mask
    assert proof.candidate is not None
    by_role = {role: name for name, role in proof.candidate.roles.items()}
    order = [name for name in core.parameters if name not in dict(core.fixed)]

    def bound(positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments by name with the value as pixels, or None if no trial had such a call."""
        given = {**dict(zip(order, positional)), **named}
        where, weights, shapes = (given.get(by_role[role]) for role in ("locations", "weights", "shapes"))
        if not isinstance(where, Tensor) or not isinstance(weights, Tensor) or where.dim() < 5:
            return None
        value = layers.as_pixels(given.get(by_role["value"]), layout, where.shape[2])
        if len(given) < len(positional) + len(named) or value is None:
            return None
        if (where.dim() == 5, weights.dim() == 4) not in kinds or not (lists or isinstance(shapes, Tensor)):
            return None
        given[by_role["value"]] = value
        return given

    @functools.wraps(core.function)
    def sample(*positional: Any, **named: Any) -> Any:
        what = proof.changed(module)
        if what is None:
            given = bound(positional, named)
            output = NotImplemented if given is None else proof.run(module, (), given)
            if output is not NotImplemented:
                return output
        elif not torch.compiler.is_compiling():
            proof.warn(module, what)
        return original(*positional, **named)

    sample.replaces = core.applied or original  # type: ignore[attr-defined]
    sample.samples = core  # type: ignore[attr-defined]
    if core.applied is None:
        return sample
    namespace = {"__module__": core.applied.__module__, "replaces": core.applied, "samples": core}
    return type(core.applied.__name__, (), {**namespace, "apply": staticmethod(sample)})
