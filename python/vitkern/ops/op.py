# SPDX-License-Identifier: Apache-2.0
"""The op: registration with torch, fakes, plans, and both paths to a kernel.

An op brings a record of its arguments, a check and a plan. This file registers it completely with torch's library:
``torch.ops.vitkern.X`` passes opcheck, compiles, exports, and trains after export; its backward is an op too, whose own
derivative raises. A call goes ``functional -> Op -> plan -> kernel``, by the fast path or by the dispatcher's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from vitkern import _C
from vitkern.ops import backends, fast_path, private
from vitkern.ops.checks import check_memory, check_types
from vitkern.ops.derivative import Derivative
from vitkern.ops.fast_path import Planned
from vitkern.ops.plan import Gradients, Needed, Outputs, Plan, Record, Spec, Tensors

_library = torch.library.Library("vitkern", "FRAGMENT")

_MOST_PLANS = 4096  # of an op; then all are forgotten


class Op(Derivative[Record], Generic[Record]):
    """torch.ops.vitkern.<name>. Calling the object is the same, through a fast path that skips the dispatcher.

    There is a plan for each signature: the dtypes, devices, shapes and contiguity of the tensors, and the options. An
    argument that changes from call to call, such as a seed, has to be a tensor.

    Args:
        name: of the op; its backward is <name>_backward.
        inputs: the record of its arguments, from which its schema is made: see vitkern.ops.plan.
        differentiable: the tensors that have a gradient, in order.
        check: of real or fake arguments: raises if one is wrong, without reading elements, and returns shape and dtype
            of each output. The first output is the result; others are kept for backward.
        plan: of the backend, the arguments and the outputs.
        limits: of a backend and the arguments: the reason why its kernels cannot take them, with the actual size and
            the allowed size; None if they can.
        dtypes: of the arguments: the dtype that kernels read a tensor in; others are read in that of the first.
        reference: of the arguments: the result by differentiable torch code.
        kept: the number of outputs after the result.
        keeps_result: whether the backward needs the result too, before the others.
        passed_on: a tensor of the result's shape and dtype that is added to the result unchanged: its gradient is
            grad_output itself. It is not saved, and None in the backward pass.
        flops: of the shapes of the tensors: the operations of a forward pass, for vitkern.ops.flops.
    """

    def __init__(
        self,
        name: str,
        inputs: Callable[..., Record],
        *,
        differentiable: Sequence[str],
        check: Callable[[Record], Sequence[Spec]],
        plan: Callable[[str, Record, Sequence[Spec]], Plan],
        reference: Callable[[Record], Tensor],
        limits: Callable[[str, Record], str | None] = lambda *_: None,
        dtypes: Callable[[Record], dict[str, torch.dtype]] = lambda _: {},
        kept: int = 0,
        keeps_result: bool = False,
        passed_on: str | None = None,
        flops: Callable[..., int],
    ) -> None:
        super().__init__(name, inputs, differentiable, check, passed_on, kept, keeps_result)
        self._plan, self._reference, self.limits, self._dtypes = plan, reference, limits, dtypes
        self.flops = flops
        self._plans: dict[object, Planned | None] = {}  # by signature; None: the reference runs

        self._define(name, self._arguments, 1 + kept, self._run_forward, self._fake_forward)
        arguments = self._arguments_of_backward()
        count = len(differentiable)
        self._define(f"{name}_backward", arguments, count, self._run_backward, self._fake_backward)
        torch.library.register_autograd(f"vitkern::{name}_backward", self._refuse, lib=_library)
        self._fast, self._fast_all = self._fast_path(False), self._fast_path(True)
        self._register_autograd()
        REGISTERED.append(self)

    @staticmethod
    def _define(
        name: str, arguments: list[str], outputs: int, real: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        gives = ", ".join(["Tensor"] * outputs)
        _library.define(f"{name}({', '.join(arguments)}) -> {gives if outputs == 1 else f'({gives})'}")
        _library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vitkern::{name}", fake, lib=_library)

    def _register_autograd(self) -> None:
        """Registers as torch.library.register_autograd does; if torch allows it, with the fast path before it."""
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

    def _fast_path(self, all_outputs: bool) -> Callable[..., Any]:
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
            all_outputs,
        )

    def __call__(self, *inputs: Any) -> Tensor:
        if not fast_path.is_compiling():
            output: Tensor | None = self._fast(*inputs)
            if output is not None:
                return output
        check_types(self.name, self._arguments, inputs)  # before the lookup of plans, which hashes arguments
        record, tensors = self._inputs(*inputs), inputs[: self._tensors]
        if fast_path.nothing_watches():
            if fast_path.sign(tensors) is None:
                check_memory(self.name, self._names, tensors)
            elif self._planned(record) is None:
                return self._reference(record)
            elif (output := self._fast(*inputs)) is not None:  # None: another thread forgot all plans since
                return output
        return self._through_the_dispatcher(record)

    def _refusals(self, inputs: Record) -> backends.Refusals:
        reasons = [(name, self.limits(name, inputs)) for name in backends.BACKENDS]
        return tuple([(name, reason) for name, reason in reasons if reason is not None])

    def _through_the_dispatcher(self, inputs: Record) -> Tensor:
        compiling = fast_path.is_compiling()
        refusals: backends.Refusals = ()
        # A limit that is tested while tracing would bound sizes that are to be dynamic.
        if not compiling:
            self._check(inputs)  # limits are tested only for tensors that fit one another
            refusals = self._refusals(inputs)
        if backends.falls_to_reference(inputs[0].device, inputs[0].dtype, inputs[-1], refusals):
            if compiling:
                self._check(inputs)
            return self._reference(inputs)
        fast_path.refuse_transforms(self.name)
        output = getattr(torch.ops.vitkern, self.name)(*inputs)
        result: Tensor = output[0] if self._kept else output
        return result

    def _planned(self, inputs: Record) -> Planned | None:
        """The plan of a call's signature; None if the reference runs."""
        tensors: Tensors = inputs[: self._tensors]
        signature = fast_path.sign(tensors)
        key = (signature, *inputs[self._tensors :])
        if key in self._plans:
            return self._plans[key]
        if signature is None:
            check_memory(self.name, self._names, tensors)
        outputs = self._check(inputs)
        backend = backends.choose(inputs[0].device, inputs[0].dtype, inputs[-1], self._refusals(inputs))
        planned = None if backend == "reference" else self._new_plan(backend, inputs, outputs)
        if len(self._plans) == _MOST_PLANS:
            self._plans.clear()
        if signature is not None:
            self._plans[key] = planned
        return planned

    def _new_plan(self, backend: str, inputs: Record, outputs: Sequence[Spec]) -> Planned:
        plan = self._prepared(self._plan(backend, inputs, outputs), inputs)
        recorded = self._record(plan.backward, inputs, outputs)
        differentiate = functools.partial(self._differentiate, positions=self._recorded, recorded=recorded)
        recorder = functools.partial(
            fast_path.recorder, self.name, plan.forward, differentiate, self._passed_on
        )
        if not self._kept:
            record = record_all = recorder(None, True)
        else:
            record, record_all = (recorder(self._keep, all_outputs) for all_outputs in (False, True))
        return Planned(plan.forward, record, record_all, plan.backward)

    def _prepared(self, plan: Plan, inputs: Record) -> Plan:
        """The plan for tensors as they come: contiguous or not, in the kernels' dtypes or in others."""
        count, dtypes = self._tensors, self._dtypes(inputs)

        def ready(tensors: Tensors) -> Tensors:
            return tuple(
                None if tensor is None else tensor.to(dtype).contiguous()
                for tensor, dtype in zip(tensors, wanted)
            )

        def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
            return dtypes.get(name, inputs[0].dtype if tensor.is_floating_point() else tensor.dtype)

        given = list(zip(self._names, inputs[:count]))
        wanted = [None if tensor is None else dtype_of(name, tensor) for name, tensor in given]
        if all(
            tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
            for tensor, dtype in zip(inputs, wanted)
        ):
            return plan

        def forward(*tensors: Tensor | None) -> Outputs:
            return plan.forward(*ready(tensors))

        def backward(needed: Needed, grad_output: Tensor, *tensors: Tensor | None) -> Gradients:
            return plan.backward(needed, grad_output, *ready(tensors[:count]), *tensors[count:])

        return Plan(forward, backward)

    def _launchable(self, inputs: Record) -> Planned:
        planned = self._planned(inputs)
        if planned is None:
            raise RuntimeError(
                "the plain torch reference is no kernel: call vitkern's function with backend='reference'"
            )
        return planned

    def _run_forward(self, *inputs: Any) -> Outputs:
        record = self._complete(inputs)
        return self._launchable(record).run(*inputs[: self._tensors])

    def _fake_forward(self, *inputs: Any) -> Outputs:
        outputs = self._check(self._complete(inputs))
        fakes = tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in outputs)
        return fakes if self._kept else fakes[0]


REGISTERED: list[Op[Any]] = []


def forget_plans() -> None:
    """Forgets all plans: call it when a backend can run that could not before, or no longer can."""
    backends.choose.cache_clear()
    for op in REGISTERED:
        op._plans.clear()
