# SPDX-License-Identifier: Apache-2.0
"""What every op of the library ``vitkern`` has in common: registration, fakes, autograd, and the short way in.

An op brings its schema, its checks, its plan and its launches; this file makes a citizen of torch of it:
``torch.ops.vitkern.X`` passes opcheck, compiles, exports, and trains after export; its backward is an op too, whose own
derivative raises. Where nothing but autograd watches, a call takes the short way of ``vitkern.ops.direct``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library import autograd as dispatched

from vitkern import _C, backends
from vitkern.ops import direct
from vitkern.ops.checks import check_memory, check_types
from vitkern.ops.derivative import Derivative, Spec

_library = torch.library.Library("vitkern", "FRAGMENT")

# The last argument of every schema: which backend is to run, None for the best.
BACKEND = "str? backend=None"

_MOST_PLANS = 4096  # of an op; then it starts afresh


class Op(Derivative):
    """torch.ops.vitkern.<name>; called, the same by the shortest way that nobody can tell from the dispatcher's.

    Its arguments are tensors (``Tensor``, or ``Tensor?`` where None may come) and then options, the backend last. There
    is a plan for each set of options: what changes from call to call, such as a seed, has to be a tensor.

    Args:
        name: of the op; its backward is <name>_backward.
        schema: the arguments as torch.library writes them.
        defaults: of the options, which the dispatcher leaves out where they have them.
        differentiable: positions of the tensors that have a gradient.
        check: of all arguments, real or fake: raises what is wrong without reading elements, and returns shape and
            dtype of each output. The first output is the result; others are what the backward wants kept.
        plan: of the backend and all arguments: what follows from shapes, dtypes, device and options, worked out once
            for each set of these. Strides and elements may be others the next time.
        forward: of the plan; returns a function of the tensors as they come, which returns the output, or a tuple of
            outputs.
        backward: of the plan, a contiguous grad_output, `needed`, the tensors and the outputs that were kept; returns a
            gradient or None for each differentiable tensor.
        reference: of all arguments but the backend: the result by differentiable torch code.
        kept: how many outputs follow the result.
        keeps_result: whether the backward wants the result too, before the others.
        passed_on: positions of the tensors, of the result's shape and dtype, that are added to the result as they are:
            grad_output itself is their gradient. They are not saved, and None in the backward pass.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        defaults: tuple,
        differentiable: tuple[int, ...],
        check: Callable[..., Sequence[Spec]],
        plan: Callable[..., Any],
        forward: Callable[..., Any],
        backward: Callable[..., Sequence[Tensor | None]],
        reference: Callable[..., Tensor],
        kept: int = 0,
        keeps_result: bool = False,
        passed_on: tuple[int, ...] = (),
    ) -> None:
        self.name, self.differentiable, self._defaults, self._kept = name, differentiable, defaults, kept
        self._keeps_result = keeps_result
        self._saved = slice(0 if keeps_result else 1, 1 + kept)  # of the outputs, those that backward gets
        self._passed_on = passed_on
        self._check, self._plan, self._reference = check, plan, reference
        self._forward, self._backward = forward, backward
        # By key of the tensors and options; None: the reference is to run.
        self._plans: dict[tuple, direct.Planned | None] = {}
        self._recorded = tuple(sorted((*differentiable, *passed_on)))  # positions that may want a gradient
        arguments = schema.split(", ")
        self._tensors = len(arguments) - len(defaults)
        tensors, options = arguments[: self._tensors], arguments[self._tensors :]
        self._arguments = arguments
        saved = ["Tensor result", *(f"Tensor kept_{index}" for index in range(kept))][self._saved]
        self._names = tuple(argument.split()[1] for argument in tensors + saved)  # of the tensors of backward

        self._define(name, arguments, 1 + kept, self._run_forward, self._fake_forward)
        first = ["Tensor grad_output", f"bool[{len(differentiable)}] needed"]
        inputs = [
            argument.replace("Tensor ", "Tensor? ") if at in passed_on else argument
            for at, argument in enumerate(tensors)
        ]
        arguments = first + inputs + saved + options
        self._define(
            f"{name}_backward", arguments, len(differentiable), self._run_backward, self._fake_backward
        )
        torch.library.register_autograd(f"vitkern::{name}_backward", self._refuse, lib=_library)
        # To the result, None where the call has to go another way; and to all outputs.
        self.short_way, short_way = (self._shorten(everything) for everything in (False, True))
        # What torch.library.register_autograd would register, for all but the short way.
        overload = getattr(torch.ops.vitkern, name).default
        long_way = dispatched.make_autograd_impl(overload, dispatched.Info(self._derive, self._set_up))

        def run_autograd(keyset, *inputs):
            output = short_way(*inputs)
            return long_way(keyset, *inputs) if output is None else output

        _library.impl(name, run_autograd, "Autograd", with_keyset=True)
        _ops.append(self)

    @staticmethod
    def _define(name, arguments, outputs, real, fake) -> None:
        gives = ", ".join(["Tensor"] * outputs)
        _library.define(f"{name}({', '.join(arguments)}) -> {gives if outputs == 1 else f'({gives})'}")
        _library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vitkern::{name}", fake, lib=_library)

    def __call__(self, *inputs: Any) -> Tensor:
        if direct.is_compiling():
            check_types(self.name, self._arguments, inputs)
            return self._through_the_dispatcher(inputs)
        output = self.short_way(*inputs)
        return self._long_way(inputs) if output is None else output

    def _shorten(self, everything: bool) -> Callable[..., Any]:
        return _C.short_way(
            direct.describe,
            direct.watched,
            torch.is_grad_enabled,
            self._tensors,
            self._defaults,
            self._recorded,
            self._plans,
            everything,
        )

    def _long_way(self, inputs: tuple) -> Tensor:
        """For what is watched, and for the first call of its kind."""
        check_types(self.name, self._arguments, inputs)  # before plans are looked up by what must be hashable
        tensors = inputs[: self._tensors]
        if direct.nothing_watches() and direct.describe(tensors) is None:
            check_memory(self.name, self._names, tensors)
        elif direct.nothing_watches():
            if self._planned(inputs) is None:
                return self._reference(*inputs[:-1])
            output = self.short_way(*inputs)
            if output is not None:  # else another thread has made all plans be forgotten since
                return output
        return self._through_the_dispatcher(inputs)

    def _through_the_dispatcher(self, inputs: tuple) -> Tensor:
        if backends.falls_to_reference(inputs[0].device, inputs[0].dtype, inputs[-1]):
            self._check(*inputs)
            return self._reference(*inputs[:-1])
        direct.refuse_transforms(self.name)
        output = getattr(torch.ops.vitkern, self.name)(*inputs)
        return output[0] if self._kept else output

    def _planned(self, inputs: tuple) -> direct.Planned | None:
        """What runs inputs like these, None where it is the reference."""
        described, options = direct.describe(inputs[: self._tensors]), inputs[self._tensors :]
        key = (described, *options)
        if key in self._plans:
            return self._plans[key]
        if described is None:
            check_memory(self.name, self._names, inputs[: self._tensors])
        specs = self._check(*inputs)
        backend = backends.choose(inputs[0].device, inputs[0].dtype, inputs[-1])
        planned = None
        if backend != "reference":
            plan = self._plan(backend, *inputs)
            run = self._forward(plan)
            recorded = self._record(plan, inputs, specs)
            differentiate = functools.partial(
                self._differentiate, positions=self._recorded, recorded=recorded
            )
            recorder = functools.partial(direct.recorder, self.name, run, differentiate, self._passed_on)
            if self._kept:
                record, record_all = (recorder(self._keep, everything) for everything in (False, True))
            else:
                record = record_all = recorder(None, True)
            planned = direct.Planned(run, record, record_all, plan)
        if len(self._plans) == _MOST_PLANS:
            self._plans.clear()
        if described is not None:
            self._plans[key] = planned
        return planned

    def _launchable(self, inputs: tuple) -> direct.Planned:
        planned = self._planned(inputs)
        if planned is None:
            raise RuntimeError(
                "the plain torch reference is no kernel: call vitkern's function with backend='reference'"
            )
        return planned

    def _complete(self, inputs: tuple, tensors: int) -> tuple:
        """All arguments, where the dispatcher leaves defaults out and has lists of numbers for tuples."""
        options = inputs[tensors:]
        options += self._defaults[len(options) :]
        return *inputs[:tensors], *(tuple(o) if isinstance(o, list) else o for o in options)

    def _run_forward(self, *inputs):
        inputs = self._complete(inputs, self._tensors)
        return self._launchable(inputs).run(*inputs[: self._tensors])

    def _fake_forward(self, *inputs):
        specs = self._check(*self._complete(inputs, self._tensors))
        outputs = tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in specs)
        return outputs if self._kept else outputs[0]


_ops: list[Op] = []


def forget_plans() -> None:
    """For when backends can run that could not before, or the other way round."""
    backends.choose.cache_clear()
    for op in _ops:
        op._plans.clear()


@functools.cache
def kernel(op: str, direction: str, backend: str) -> Callable[..., Any]:
    """The launch function of an op for a backend, imported when first needed."""
    family = "triton" if backend == "triton" else "native"
    module = importlib.import_module(f"vitkern.ops.{family}_{op}")
    return getattr(module, f"{op}_{direction}_{backend}")
