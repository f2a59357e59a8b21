# SPDX-License-Identifier: Apache-2.0
"""The gradient of an op: the tensors that forward keeps and backward gets, and the check that these are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from vitkern import _C
from vitkern.ops import fast_path
from vitkern.ops.checks import Seen, check_memory, check_output, refuse_changes, seen
from vitkern.ops.plan import Gradients, Needed, Record, Spec, Tensors, schema_of


def _never(*_: object) -> None:
    """Stands for a missing fast path: returns None."""


class Recorded(NamedTuple):
    """The facts about a forward pass that its backward needs."""

    options: tuple[object, ...]
    saved: tuple[Seen | None, ...]  # shapes, dtypes and devices of the tensors that backward needs again
    # Takes the flags of the needed gradients, grad_output and these tensors; None if the plan does not serve.
    fast: Callable[..., Gradients | None] = _never
    rounds: bool = True  # whether kernels may give gradients of other dtypes than the tensors'


class Derivative(Generic[Record]):
    """The half of an op for its gradient: see vitkern.ops.op.Op."""

    _launchable: Callable[[Record], fast_path.Planned]

    def __init__(
        self,
        name: str,
        inputs: Callable[..., Record],
        differentiable: Sequence[str],
        check: Callable[[Record], Sequence[Spec]],
        passed_on: str | None,
        kept: int,
        keeps_result: bool,
    ) -> None:
        self.name, self._inputs, self._check = name, inputs, check
        tensors, options, self._defaults = schema_of(inputs)
        self._tensors, self._arguments = len(tensors), [*tensors, *options]  # in the schema's form
        self._saved = slice(0 if keeps_result else 1, 1 + kept)  # of the outputs, those that backward gets
        saved = ["result", *(f"kept_{index}" for index in range(kept))][self._saved]
        # Names of the tensors that backward gets: the inputs, and those that forward kept.
        self._names = (*(argument.split()[1] for argument in tensors), *saved)
        self._differentiable = tuple(self._names.index(each) for each in differentiable)
        self._passed_on = None if passed_on is None else self._names.index(passed_on)
        beside = () if self._passed_on is None else (self._passed_on,)
        self._recorded = tuple(sorted((*self._differentiable, *beside)))  # positions that may need a gradient
        self._kept, self._keeps_result = kept, keeps_result

    def _arguments_of_backward(self) -> list[str]:
        tensors, options = self._arguments[: self._tensors], self._arguments[self._tensors :]
        if self._passed_on is not None:
            tensors[self._passed_on] = tensors[self._passed_on].replace("Tensor ", "Tensor? ")
        saved = [f"Tensor {name}" for name in self._names[self._tensors :]]
        return ["Tensor grad_output", f"bool[{len(self._differentiable)}] needed", *tensors, *saved, *options]

    def _complete(self, inputs: tuple[Any, ...]) -> Record:
        """All arguments as a record: the dispatcher leaves defaults out, and has lists of numbers instead of tuples."""
        options = (tuple(each) if isinstance(each, list) else each for each in inputs[self._tensors :])
        return self._inputs(*inputs[: self._tensors], *options)

    def _keep(self, ctx: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs for autograd to save, without the result, which could then not be changed in place."""
        if self._keeps_result:
            alias = outputs[0].detach()  # counts the changes of the result
            ctx.result = alias, alias._version
        return outputs[1:]

    def _recall(self, ctx: Any, options: tuple[object, ...]) -> tuple[Any, ...]:
        """The tensors that backward needs again."""
        saved: tuple[Any, ...] = ctx.saved_tensors  # under activation checkpointing, only one read works
        if not self._keeps_result:
            return saved
        (result, version), inputs = ctx.result, saved[: self._tensors]
        if result._version != version:  # it has been changed in place, so it is computed again
            with torch.no_grad():
                result = getattr(torch.ops.vitkern, self.name)(*inputs, *options)[0]
        return (*inputs, result, *saved[self._tensors :])

    def _record(
        self, backward: Callable[..., Gradients], inputs: Record, outputs: Sequence[Spec]
    ) -> Recorded:
        fakes = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in outputs]
        tensors = fast_path.without(inputs[: self._tensors], self._passed_on)
        saved = (*tensors, *fakes[self._saved])
        # A gradient may be contiguous or not; saved tensors are unchanged.
        gradients = fakes[0], fakes[0].new_empty(()).expand(fakes[0].shape)
        signatures = (fast_path.sign((gradient, *saved)) for gradient in gradients)
        usual = [signature for signature in signatures if signature is not None]
        fast: Callable[..., Gradients | None] = _never
        if fast_path.watched is not None:
            ask = fast_path.sign, fast_path.watched, torch.is_grad_enabled
            fast = _C.fast_backward(*ask, usual, backward)
        dtypes = {inputs[at].dtype for at in self._differentiable if inputs[at] is not None}
        rounds = dtypes not in ({torch.float32}, {torch.float64})
        return Recorded(inputs[self._tensors :], seen(saved), fast, rounds)

    def _received(
        self, grad_output: Tensor, needed: Sequence[bool], inputs: tuple[Any, ...]
    ) -> tuple[Record, Tensors, Needed]:
        """The record of the forward pass; the tensors of the backward pass, with the kept ones; the needed flags.

        grad_output stands for a tensor that was not saved: it has the same shape, dtype and device.
        """
        count, tensors = self._tensors, inputs[: len(self._names)]
        saved = list(tensors[:count])
        for at, argument in enumerate(self._arguments[:count]):
            if saved[at] is None and argument.startswith("Tensor "):
                saved[at] = grad_output
        forward = self._complete((*saved, *inputs[len(self._names) :]))
        specs = self._check(forward)
        names = ("grad_output", *self._names[count:])
        outputs = zip((grad_output, *tensors[count:]), (specs[0], *specs[self._saved]))
        for name, (output, (shape, dtype)) in zip(names, outputs):
            check_output(self.name, name, output, (torch.Size(shape), dtype, forward[0].device))
        if len(needed) != len(self._differentiable):
            raise ValueError(
                f"{self.name}: needed must be {len(self._differentiable)} truth values, got {needed}"
            )
        possible = (forward[position] is not None for position in self._differentiable)
        return forward, tensors, tuple(need and can for need, can in zip(needed, possible))

    def _run_backward(self, grad_output: Tensor, needed: Sequence[bool], *inputs: Any) -> tuple[Tensor, ...]:
        forward, tensors, wanted = self._received(grad_output, needed, inputs)
        backward = self._launchable(forward).backward
        if fast_path.sign((grad_output, *tensors)) is None:
            check_memory(self.name, ("grad_output", *self._names), (grad_output, *tensors))
        # The plan is for inputs of these strides; outputs of a forward pass are contiguous.
        outputs = (None if output is None else output.contiguous() for output in tensors[self._tensors :])
        ready = (*tensors[: self._tensors], *outputs)
        gradients = self._rounded(backward(wanted, grad_output.contiguous(), *ready), ready)
        return tuple(forward[0].new_empty(0) if gradient is None else gradient for gradient in gradients)

    def _rounded(self, gradients: Gradients, tensors: tuple[Any, ...]) -> Gradients:
        """The gradients in the dtypes of their tensors."""
        return [
            gradient
            if gradient is None or gradient.dtype == tensors[at].dtype
            else gradient.to(tensors[at].dtype)
            for gradient, at in zip(gradients, self._differentiable)
        ]

    def _fake_backward(self, grad_output: Tensor, needed: Sequence[bool], *inputs: Any) -> tuple[Tensor, ...]:
        forward, _, wanted = self._received(grad_output, needed, inputs)
        return tuple(
            forward[position].new_empty(forward[position].shape) if need else forward[0].new_empty(0)
            for position, need in zip(self._differentiable, wanted)
        )

    def _set_up(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if self._kept else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        tensors = fast_path.without(inputs[: self._tensors], self._passed_on)
        ctx.save_for_backward(*tensors, *self._keep(ctx, outputs))
        ctx.recorded = Recorded(inputs[self._tensors :], seen((*tensors, *outputs[self._saved])))

    def _derive(self, ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of all arguments, for the dispatcher."""
        gradients = self._differentiate(ctx, grad_output, range(self._tensors), ctx.recorded)
        return *gradients, *(None for _ in ctx.recorded.options)

    def _differentiate(
        self, ctx: Any, grad_output: Tensor, positions: Sequence[int], recorded: Recorded
    ) -> Gradients:
        """Gradients of the tensors at these positions, of which ctx has a record."""
        flags: Needed = ctx.needs_input_grad
        # A flag for each gradient, in order.
        same = positions is self._recorded and self._passed_on is None
        wanted = {} if same else dict(zip(positions, flags))
        needed = flags[: len(positions)] if same else tuple([wanted[at] for at in self._differentiable])
        saved = self._recall(ctx, recorded.options)
        fast = _never if fast_path.is_compiling() else recorded.fast
        gradients = fast(needed, grad_output, *saved)
        if gradients is None:
            refuse_changes(self.name, self._names, recorded.saved, saved)
            backward = getattr(torch.ops.vitkern, f"{self.name}_backward")
            gradients = backward(grad_output, needed, *saved, *recorded.options)
        elif recorded.rounds:
            gradients = self._rounded(gradients, saved)
        if same:
            return [each if flag else None for each, flag in zip(gradients, needed)]
        found = dict(zip(self._differentiable, gradients))
        if self._passed_on is not None:
            found[self._passed_on] = grad_output
        return [found.get(at) if wanted[at] else None for at in positions]

    def _refuse(self, ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"vitkern.{self.name} has no second derivative in its kernels; backend='reference' has those of any order"
        )
