# SPDX-License-Identifier: Apache-2.0
"""The copy of a layer that a trial runs: its code and sizes, but drawn weights on the CPU and plain children.

No weight of the layer is read, so it may be on a card, on meta, sharded or quantised. Children are called, not read:
each is a stand-in that records its calls, and records any read of its attributes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkern.compat.trial.functions import is_core, subclass

PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, type, range)
_CODE = (types.FunctionType, types.BuiltinFunctionType)


class UnfitError(Exception):
    """The layer cannot be tried, or must not be replaced: the message says why."""


class Draws:
    """Random numbers from a generator of their own; torch's generator is not used."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        numbers = torch.empty(shape, dtype=torch.float32, device="cpu")
        return numbers.uniform_(low, high, generator=self._generator)

    def integers(self, *shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, dtype=torch.int64, device="cpu")


class Child(nn.Module):
    """Stands in for a linear child, or for one that keeps the shape (half as much again of x).

    The code under trial calls it and cannot look inside, so a cheap map serves: each output is a weighted sum of the
    inputs with the same index modulo the outputs, plus a bias. Dtypes are those of a linear layer.
    """

    def __init__(self, name: str, sizes: tuple[int, int] | None, draws: Draws) -> None:
        super().__init__()
        self._name = name
        self._calls: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._reads: list[str] = []
        self._sizes = sizes
        self._master: dict[str, Tensor] = {}
        if sizes is not None:
            inputs, outputs = sizes
            self._master["weight"] = draws.uniform(max(-(-inputs // outputs), 1), outputs, low=0.2, high=1.0)
            self._master["bias"] = draws.uniform(outputs, low=-0.5, high=0.5)
        self._now = dict(self._master)

    def __call__(self, x: Tensor) -> Tensor:  # without the global module hooks
        self._calls.append(x.detach())
        self._outputs.append(self._mapped(x))
        return self._outputs[-1].clone()  # the code may write into it

    def _mapped(self, x: Tensor) -> Tensor:
        if self._sizes is None:
            return x * 1.5
        weight, bias = self._now["weight"], self._now["bias"]
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (each.to(torch.get_autocast_dtype("cpu")) for each in (x, weight, bias))
        inputs, outputs = self._sizes
        if x.shape[-1] != inputs or x.dtype != weight.dtype:
            raise RuntimeError(
                f"{self._name} takes {inputs} channels of {weight.dtype}, got {x.shape[-1]} of {x.dtype}"
            )
        if inputs <= outputs:
            x = x.repeat(*[1] * (x.dim() - 1), -(-outputs // inputs))[..., :outputs]
            return x * weight[0] + bias
        x = F.pad(x, (0, -inputs % outputs)).unflatten(-1, (-1, outputs))
        return (x * weight).sum(-2) + bias

    @contextlib.contextmanager
    def shifted(self) -> Iterator[None]:
        """Sets another bias inside a ``with`` block."""
        kept = self._master["bias"]
        self._master["bias"] = kept + 1
        try:
            yield
        finally:
            self._master["bias"] = kept

    def __getattr__(self, name: str) -> Any:  # called for attributes that the stand-in lacks
        if not name.startswith("_"):
            self._reads.append(name)
        raise AttributeError(f"{self._name} of a trial has no {name}")


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a child that is a linear map, or that wraps one."""
    sizes = []
    for each in module.modules():
        inputs, outputs = getattr(each, "in_features", None), getattr(each, "out_features", None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            if each is module:
                return inputs, outputs
            sizes.append((inputs, outputs))
    if isinstance(module, nn.Sequential) and sizes:
        return sizes[0][0], sizes[-1][1]
    return max(sizes, key=lambda pair: pair[0] * pair[1], default=None)


def _keeps_shape(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity))


class Specimen:
    """A module to run, its stand-ins, and a record of reads and writes by its code."""

    def __init__(self, layer: nn.Module, kind: type[nn.Module], seed: int = 0) -> None:
        self.listening = False
        self.heads, self.steep = 1, 0.0  # the size of logits; 0: as drawn
        self.draws = Draws(seed)
        self.reads: set[str] = set()
        self.misses: set[str] = set()
        self.writes: set[str] = set()
        self.children: dict[str, Child] = {}
        self._kind = kind
        self.module = self._copy(layer)
        self._buffers = dict(self.module._buffers)
        self._parameters = {
            name: each.detach() for name, each in self.module._parameters.items() if each is not None
        }
        self._attributes = {name: value for name, value in vars(layer).items() if is_own(name)}

    def enter(self, methods: Mapping[str, Any]) -> None:
        """Gives the module these methods of its class."""
        self.module.__class__ = _recorded(self._kind, methods, self)

    def _copy(self, layer: nn.Module) -> nn.Module:
        module = _bare(self._kind)
        own = {name: _copied(value) for name, value in vars(layer).items() if is_own(name)}
        vars(module).update(own)
        for name, child in layer._modules.items():
            module._modules[name] = None if child is None else self._child(name, child)
        for name, parameter in layer._parameters.items():
            module._parameters[name] = (
                None if parameter is None else nn.Parameter(self._drawn(name, parameter))
            )
        for name, buffer in layer._buffers.items():
            module._buffers[name] = None if buffer is None else self._drawn_buffer(name, buffer)
        module.training = False
        return module

    def _child(self, name: str, child: nn.Module) -> nn.Module:
        if is_core(child):
            core = _bare(_without_hooks(type(child)))
            vars(core).update({key: _copied(value) for key, value in vars(child).items() if is_own(key)})
            forward = getattr(type(child).forward, "replaces", None)
            if forward is not None:  # this package's kernel cannot prove itself
                vars(core)["forward"] = types.MethodType(forward, core)
            return core
        sizes = None if _keeps_shape(child) else _linear_sizes(child)
        if sizes is None and not _keeps_shape(child):
            raise UnfitError(
                f"its child {name!r} is a {type(child).__name__}, for which there is no stand-in"
            )
        self.children[name] = Child(name, sizes, self.draws)
        return self.children[name]

    def _drawn(self, name: str, tensor: Tensor) -> Tensor:
        return self.draws.uniform(*tensor.shape, low=0.25, high=1.0)

    def _drawn_buffer(self, name: str, buffer: Tensor) -> Tensor:
        if not buffer.is_floating_point():
            raise UnfitError(f"its buffer {name!r} has numbers of type {buffer.dtype}, which cannot be drawn")
        # 0.5 or 1: steps of whole pixels stay whole, or halve.
        return self.draws.integers(*buffer.shape, low=1, high=3).to(torch.float32) / 2

    def prepare(self, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
        """Makes fresh leaves of all weights in a dtype. Returns the layer's own by name."""
        leaves: dict[str, Tensor] = {}
        for name, child in self.children.items():
            child._calls.clear()
            child._outputs.clear()
            values = dict(child._master)
            if name == "attention_weights" and self.steep:
                values["bias"] = self._steep(values["bias"])
            child._now = {key: _leaf(value, dtype) for key, value in values.items()}
        for name, buffer in self._buffers.items():
            self.module._buffers[name] = None if buffer is None else buffer.to(dtype)
        for name, tensor in self._parameters.items():
            parameter = nn.Parameter(tensor.to(dtype, copy=True))
            self.module._parameters[name] = leaves[name] = parameter
        vars(self.module)["training"] = training
        return leaves

    def _steep(self, bias: Tensor) -> Tensor:
        """Large logits; the larger half of each head's are equal, since a weight of 1 has only rounding as gradient."""
        logits = (bias * 2 * self.steep).view(self.heads, -1)
        return logits.minimum(logits.median(1, keepdim=True).values).flatten()

    def names(self) -> set[str]:
        """The layer's own attributes, parameters, buffers, children and methods."""
        module = self.module
        methods = (name for base in self._kind.__mro__ if base is not nn.Module for name in vars(base))
        functions = {name for name in methods if isinstance(getattr(self._kind, name), types.FunctionType)}
        return {
            *self._attributes,
            *module._parameters,
            *module._buffers,
            *module._modules,
            *functions,
            "training",
        }

    def missing(self) -> list[str]:
        """Children that are None."""
        return [name for name, child in self.module._modules.items() if child is None]

    def calls(self) -> dict[str, list[Tensor]]:
        return {name: list(child._calls) for name, child in self.children.items()}

    def outputs(self) -> dict[str, Tensor]:
        """The outputs of children, by name. The gradients of their weights depend only on these."""
        return {
            f"{name}'s output" + f" {number}" * (number > 1): each
            for name, child in self.children.items()
            for number, each in enumerate(child._outputs, 1)
        }

    def complaint(self) -> str | None:
        """A sentence about an effect of the code on the layer that a replacement would not have, or None."""
        for name, child in self.children.items():
            if child._reads:
                return f"its forward reads {name}.{child._reads[0]} instead of calling {name}"
        if self.writes:
            return f"its forward writes the attribute {min(self.writes)!r}"
        if self.misses:
            return f"its forward asks for the attribute {min(self.misses)!r}, which the layer does not have"
        if "__dict__" in self.reads:
            return "its forward reads the layer's __dict__"
        for name, value in self._attributes.items():
            if name in self.reads and not is_plain(value):
                return f"its forward reads the attribute {name!r}, a {type(value).__name__} that may change"
            if isinstance(value, (list, dict, set)) and vars(self.module)[name] != value:
                return f"its forward changes the attribute {name!r}"
        return None

    def attributes(self) -> Iterator[tuple[str, Any]]:
        """The plain attributes that the code has read, with the layer's values."""
        for name in sorted(self.reads):
            if name in self._attributes and name != "training":
                yield name, self._attributes[name]


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_()


_HOOKS = frozenset(vars(nn.Module()))


def is_own(name: str) -> bool:
    """Whether an attribute is the layer's own, rather than a part of every module."""
    return name not in _HOOKS and not name.startswith("_forward") and name != "forward"


def _bare(kind: type[nn.Module]) -> nn.Module:
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def _without_hooks(kind: Any) -> Any:
    """A subclass whose calls run no global module hook."""
    namespace = {
        "__module__": kind.__module__,
        "__call__": lambda self, *args, **named: self.forward(*args, **named),
    }
    return subclass(kind, namespace)


def _copied(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) and is_plain(value) else value


def is_plain(value: Any) -> bool:
    """Whether a value changes only if it, or one of its items, is replaced."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return isinstance(value, (*PLAIN, *_CODE)) or _is_partial(value)


def _is_partial(value: Any) -> bool:
    return isinstance(value, functools.partial) and is_plain(value.args) and is_plain(value.keywords)


def _recorded(kind: Any, methods: Mapping[str, Any], record: Specimen) -> Any:
    """A subclass whose instances record in the specimen the reads and writes of their code."""
    inherited, inherited_set = kind.__getattribute__, kind.__setattr__

    def __getattribute__(self: nn.Module, name: str) -> Any:  # noqa: N807
        if record.listening and (name == "__dict__" or not name.startswith("__")):
            record.reads.add(name)
        return inherited(self, name)

    def __getattr__(self: nn.Module, name: str) -> Any:  # noqa: N807
        listening, record.listening = record.listening, False  # torch reads __dict__ to look for it
        try:
            return kind.__getattr__(self, name)
        except AttributeError:
            if listening:
                record.misses.add(name)
            raise
        finally:
            record.listening = listening

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if record.listening:
            record.writes.add(name)
        inherited_set(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:  # noqa: N807
        if record.listening:
            record.writes.add(name)
        kind.__delattr__(self, name)

    namespace = {
        **methods,
        "__module__": kind.__module__,
        "__getattribute__": __getattribute__,
        "__getattr__": __getattr__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
    }
    return subclass(kind, namespace)
