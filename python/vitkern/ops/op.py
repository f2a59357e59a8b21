# SPDX-License-Identifier: Apache-2.0
"""The op: registration with torch, fakes, plans, and both paths to a kernel.

An op brings its schema, its checks and its plan. This file makes a full member of torch's library of it:
``torch.ops.vitkern.X`` passes opcheck, compiles, exports, and trains after export; its backward is an op too, whose own
derivative raises. A call goes ``functional -> Op -> plan -> kernel``, by the fast path or by the dispatcher's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkern import _C
from vitkern.ops import backends, fast_path, private
from vitkern.ops.checks import check_memory, check_types
from vitkern.ops.derivative import Derivative, Spec
from vitkern.ops.fast_path import Planned, Tensors

_library = torch.library.Library("vitkern", "FRAGMENT")

# The last argument of every schema: which backend is to run, None for the best.
BACKEND = "str? backend=None"

_MOST_PLANS = 4096  # of an op; then it starts afresh


class Plan(NamedTuple):
    """How calls of one signature run, on contiguous tensors of the dtypes that the op asks for."""

    forward: Callable[..., Any]  # of the tensors: the output, or a tuple of outputs
    # Takes the flags of the wanted gradients, a contiguous grad_output, the tensors and the kept outputs; returns a
    # gradient or None for each differentiable tensor.
    backward: Callable[..., Sequence[Tensor | None]]


class Op(Derivative):
    """torch.ops.vitkern.<name>. Calling the object is the same, through a fast path that skips the dispatcher.

    Its arguments are tensors (``Tensor``, or ``Tensor?`` where None may come) and then options, the backend last. There
    is a plan for each signature: for the types, devices, shapes and contiguity of the tensors, and the options. An
    argument that changes from call to call, such as a seed, has to be a tensor.

    Args:
        name: of the op; its backward is <name>_backward.
        schema: the arguments as torch.library writes them.
        defaults: of the options, which the dispatcher leaves out where they have them.
        differentiable: positions of the tensors that have a gradient.
        check: of all arguments, real or fake: raises if one is wrong, without reading elements, and returns shape and
            dtype of each output. The first output is the result; others are kept for backward.
        plan: of the backend and all arguments.
        limits: of a backend and the tensors: why its kernels cannot take them, with the size that they have and the
            size that they may have; None if they can.
        dtypes: of the tensors: the dtype that kernels read each in, by position; others are read in that of the first.
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
        defaults: tuple[object, ...],
        differentiable: tuple[int, ...],
        check: Callable[..., Sequence[Spec]],
        plan: Callable[..., Plan],
        reference: Callable[..., Tensor],
        limits: Callable[..., str | None] = lambda *_: None,
        dtypes: Callable[..., dict[int, torch.dtype]] = lambda *_: {},
        kept: int = 0,
        keeps_result: bool = False,
        passed_on: tuple[int, ...] = (),
    ) -> None:
        arguments = schema.split(", ")
        count = len(arguments) - len(defaults)
        tensors, options = arguments[:count], arguments[count:]
        super().__init__(name, tensors, differentiable, passed_on, kept, keeps_result)
        self._arguments, self._defaults = arguments, defaults
        self._check, self._plan, self._reference = check, plan, reference
        self._limits, self._dtypes = limits, dtypes
        self._plans: dict[Any, Planned | None] = {}  # by signature; None: the reference runs

        self._define(name, arguments, 1 + kept, self._run_forward, self._fake_forward)
        first = ["Tensor grad_output", f"bool[{len(differentiable)}] needed"]
        inputs = [
            argument.replace("Tensor ", "Tensor? ") if at in passed_on else argument
            for at, argument in enumerate(tensors)
        ]
        saved = [f"Tensor {name}" for name in self._names[count:]]
        backward = [*first, *inputs, *saved, *options]
        self._define(
            f"{name}_backward", backward, len(differentiable), self._run_backward, self._fake_backward
        )
        torch.library.register_autograd(f"vitkern::{name}_backward", self._refuse, lib=_library)
        self._fast, self._fast_all = self._fast_path(False), self._fast_path(True)
        self._register_autograd()
        _ops.append(self)

    @staticmethod
    def _define(
        name: str, arguments: list[str], outputs: int, real: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        gives = ", ".join(["Tensor"] * outputs)
        _library.define(f"{name}({', '.join(arguments)}) -> {gives if outputs == 1 else f'({gives})'}")
        _library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vitkern::{name}", fake, lib=_library)

    def _register_autograd(self) -> None:
        """As torch.library.register_autograd does; where torch allows it, with the fast path before."""
        make = private.find("_library.autograd.make_autograd_impl")
        info = private.find("_library.autograd.Info")
        if make is None or info is None:
            torch.library.register_autograd(
                f"vitkern::{self.name}", self._derive, setup_context=self._set_up, lib=_library
            )
            return
        overload = getattr(torch.ops.vitkern, self.name).default
        recorded = make(overload, info(self._derive, self._set_up))

        def run_autograd(keyset: object, *inputs: Any) -> Any:
            output = self._fast_all(*inputs)
            return recorded(keyset, *inputs) if output is None else output

        _library.impl(self.name, run_autograd, "Autograd", with_keyset=True)

    def _fast_path(self, everything: bool) -> Callable[..., Any]:
        """A function of the arguments: the result, or all outputs, if this signature has a plan; else None."""
        if fast_path.watched is None:
            return lambda *_: None
        return _C.fast_path(
            fast_path.sign,
            fast_path.watched,
            torch.is_grad_enabled,
            self._tensors,
            self._defaults,
            self._recorded,
            self._plans,
            everything,
        )

    def __call__(self, *inputs: Any) -> Tensor:
        if not fast_path.is_compiling():
            output = self._fast(*inputs)
            if output is not None:
                return output
        check_types(self.name, self._arguments, inputs)  # before plans are looked up by what must be hashable
        tensors = inputs[: self._tensors]
        if fast_path.nothing_watches():
            if fast_path.sign(tensors) is None:
                check_memory(self.name, self._names, tensors)
            elif self._planned(inputs) is None:
                return self._reference(*inputs[:-1])
            elif (output := self._fast(*inputs)) is not None:  # None: another thread forgot all plans since
                return output
        return self._through_the_dispatcher(inputs)

    def _refusals(self, inputs: tuple[Any, ...]) -> backends.Refusals:
        reasons = [(name, self._limits(name, *inputs[: self._tensors])) for name in backends.BACKENDS]
        return tuple([(name, reason) for name, reason in reasons if reason is not None])

    def _through_the_dispatcher(self, inputs: tuple[Any, ...]) -> Tensor:
        compiling = fast_path.is_compiling()
        refusals: backends.Refusals = ()
        # A limit that is asked while tracing would bound sizes that are to be dynamic.
        if not compiling:
            self._check(*inputs)  # limits are asked of tensors that fit one another
            refusals = self._refusals(inputs)
        if backends.falls_to_reference(inputs[0].device, inputs[0].dtype, inputs[-1], refusals):
            if compiling:
                self._check(*inputs)
            return self._reference(*inputs[:-1])
        fast_path.refuse_transforms(self.name)
        output = getattr(torch.ops.vitkern, self.name)(*inputs)
        return output[0] if self._kept else output

    def _planned(self, inputs: tuple[Any, ...]) -> Planned | None:
        """The plan of a call's signature; None where the reference runs."""
        tensors, options = inputs[: self._tensors], inputs[self._tensors :]
        signature = fast_path.sign(tensors)
        key = (signature, *options)
        if key in self._plans:
            return self._plans[key]
        if signature is None:
            check_memory(self.name, self._names, tensors)
        specs = self._check(*inputs)
        backend = backends.choose(inputs[0].device, inputs[0].dtype, inputs[-1], self._refusals(inputs))
        planned = None if backend == "reference" else self._new_plan(backend, inputs, specs)
        if len(self._plans) == _MOST_PLANS:
            self._plans.clear()
        if signature is not None:
            self._plans[key] = planned
        return planned

    def _new_plan(self, backend: str, inputs: tuple[Any, ...], specs: Sequence[Spec]) -> Planned:
        tensors = inputs[: self._tensors]
        plan = self._prepared(self._plan(backend, *inputs), tensors)
        recorded = self._record(plan.backward, inputs, specs)
        differentiate = functools.partial(self._differentiate, positions=self._recorded, recorded=recorded)
        recorder = functools.partial(
            fast_path.recorder, self.name, plan.forward, differentiate, self._passed_on
        )
        if not self._kept:
            record = record_all = recorder(None, True)
        else:
            record, record_all = (recorder(self._keep, everything) for everything in (False, True))
        return Planned(plan.forward, record, record_all, plan.backward)

    def _prepared(self, plan: Plan, tensors: Tensors) -> Plan:
        """The plan for tensors as they come: contiguous or not, of the dtypes that kernels read or of others."""
        dtypes = self._dtypes(*tensors)
        first = tensors[0]
        assert first is not None
        wanted = [
            None
            if tensor is None
            else dtypes.get(at, first.dtype if tensor.is_floating_point() else tensor.dtype)
            for at, tensor in enumerate(tensors)
        ]
        if all(
            tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
            for tensor, dtype in zip(tensors, wanted)
        ):
            return plan

        def ready(tensors: Tensors) -> list[Tensor | None]:
            return [
                None if tensor is None else tensor.to(dtype).contiguous()
                for tensor, dtype in zip(tensors, wanted)
            ]

        def forward(*tensors: Tensor | None) -> Any:
            return plan.forward(*ready(tensors))

        def backward(needed: tuple[bool, ...], grad_output: Tensor, *tensors: Tensor | None) -> Any:
            kept = tensors[len(wanted) :]
            return plan.backward(needed, grad_output, *ready(tensors[: len(wanted)]), *kept)

        return Plan(forward, backward)

    def _launchable(self, inputs: tuple[Any, ...]) -> Planned:
        planned = self._planned(inputs)
        if planned is None:
            raise RuntimeError(
                "the plain torch reference is no kernel: call vitkern's function with backend='reference'"
            )
        return planned

    def _complete(self, inputs: tuple[Any, ...], tensors: int) -> tuple[Any, ...]:
        """All arguments, where the dispatcher leaves defaults out and has lists of numbers for tuples."""
        options = inputs[tensors:]
        options += self._defaults[len(options) :]
        return *inputs[:tensors], *(tuple(o) if isinstance(o, list) else o for o in options)

    def _run_forward(self, *inputs: Any) -> Any:
        inputs = self._complete(inputs, self._tensors)
        return self._launchable(inputs).run(*inputs[: self._tensors])

    def _fake_forward(self, *inputs: Any) -> Any:
        specs = self._check(*self._complete(inputs, self._tensors))
        outputs = tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in specs)
        return outputs if self._kept else outputs[0]


_ops: list[Op] = []


def forget_plans() -> None:
    """For when backends can run that could not before, or the other way round."""
    backends.choose.cache_clear()
    for op in _ops:
        op._plans.clear()
