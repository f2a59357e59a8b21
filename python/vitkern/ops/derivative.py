# SPDX-License-Identifier: Apache-2.0
"""The gradient of an op: what its forward pass keeps, what its backward pass gets, and that the two are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import direct
from vitkern.ops.checks import check_memory, check_output, refuse_changes, seen

Spec = tuple[Sequence[int], torch.dtype]  # of an output


class Derivative:
    """The half of an op that is about its gradient: see vitkern.ops.op.Op."""

    name: str
    differentiable: tuple[int, ...]
    _arguments: list[str]  # as the schema has them
    _names: tuple[str, ...]  # of the tensors of backward: inputs, and what forward kept
    _tensors: int  # how many of them are inputs
    _passed_on: tuple[int, ...]
    _keeps_result: bool
    _kept: int  # how many outputs follow the result
    _saved: slice  # of the outputs, those that backward gets
    _check: Callable[..., Sequence[Spec]]
    _backward: Callable[..., Sequence[Tensor | None]]
    _complete: Callable[..., tuple]
    _launchable: Callable[..., Any]

    def _keep(self, ctx, outputs: tuple) -> tuple:
        """The outputs for autograd to save: not the result, which could then not be changed in place."""
        if self._keeps_result:
            alias = outputs[0].detach()  # counts the changes of the result
            ctx.result = alias, alias._version
        return outputs[1:]

    def _recall(self, ctx, options: tuple) -> tuple:
        """The tensors that backward wants again."""
        saved = ctx.saved_tensors  # under activation checkpointing, to be asked for once
        if not self._keeps_result:
            return saved
        (result, version), inputs = ctx.result, saved[: self._tensors]
        if result._version != version:  # it has been changed in place: once more
            with torch.no_grad():
                result = getattr(torch.ops.vitkern, self.name)(*inputs, *options)[0]
        return (*inputs, result, *saved[self._tensors :])

    def _record(self, plan, inputs: tuple, specs: Sequence[Spec]) -> direct.Recorded:
        outputs = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in specs]
        saved = (*direct.without(inputs[: self._tensors], self._passed_on), *outputs[self._saved])
        # A gradient may be contiguous or not, what was saved is what it was.
        gradients = outputs[0], outputs[0].new_empty(()).expand(outputs[0].shape)
        described = (direct.describe((gradient, *saved)) for gradient in gradients)
        usual = tuple(key for key in described if key is not None)
        return direct.Recorded(inputs[self._tensors :], seen(saved), plan, usual)

    def _received(self, grad_output: Tensor, needed, inputs: tuple) -> tuple[tuple, tuple, tuple[bool, ...]]:
        """The arguments of the forward pass; the tensors of the backward pass, those and what was kept; what is needed.

        Of a tensor that was not saved, grad_output has all that may be asked for.
        """
        count = len(self._names)
        inputs = self._complete(inputs, count)
        tensors = inputs[:count]
        forward = (
            *(
                grad_output if tensor is None and argument.startswith("Tensor ") else tensor
                for argument, tensor in zip(self._arguments[: self._tensors], tensors)
            ),
            *inputs[count:],
        )
        specs = self._check(*forward)
        names = ("grad_output", *self._names[self._tensors :])
        outputs = zip((grad_output, *tensors[self._tensors :]), (specs[0], *specs[self._saved]))
        for name, (output, (shape, dtype)) in zip(names, outputs):
            check_output(self.name, name, output, (torch.Size(shape), dtype, forward[0].device))
        if len(needed) != len(self.differentiable):
            raise ValueError(
                f"{self.name}: needed must be {len(self.differentiable)} truth values, got {needed}"
            )
        possible = (forward[position] is not None for position in self.differentiable)
        return forward, tensors, tuple(need and can for need, can in zip(needed, possible))

    def _run_backward(self, grad_output, needed, *inputs):
        inputs, tensors, needed = self._received(grad_output, needed, inputs)
        plan = self._launchable(inputs).plan
        if direct.describe((grad_output, *tensors)) is None:
            check_memory(self.name, ("grad_output", *self._names), (grad_output, *tensors))
        # Launches see to the strides of inputs; outputs of a forward pass have no others.
        outputs = (output.contiguous() for output in tensors[self._tensors :])
        gradients = self._gradients(plan, grad_output, needed, (*tensors[: self._tensors], *outputs))
        return tuple(inputs[0].new_empty(0) if gradient is None else gradient for gradient in gradients)

    def _gradients(self, plan, grad_output, needed, tensors) -> list[Tensor | None]:
        gradients = self._backward(plan, grad_output.contiguous(), tuple(needed), *tensors)
        return [
            gradient if gradient is None else gradient.to(tensors[position].dtype)
            for gradient, position in zip(gradients, self.differentiable)
        ]

    def _fake_backward(self, grad_output, needed, *inputs):
        inputs, _, needed = self._received(grad_output, needed, inputs)
        return tuple(
            inputs[position].new_empty(inputs[position].shape) if need else inputs[0].new_empty(0)
            for position, need in zip(self.differentiable, needed)
        )

    def _set_up(self, ctx, inputs, output) -> None:
        outputs = output if self._kept else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        tensors = direct.without(inputs[: self._tensors], self._passed_on)
        ctx.save_for_backward(*tensors, *self._keep(ctx, outputs))
        ctx.recorded = direct.Recorded(inputs[self._tensors :], seen((*tensors, *outputs[self._saved])))

    def _derive(self, ctx, grad_output, *_):
        """Gradients of all arguments, for the dispatcher."""
        gradients = self._differentiate(ctx, grad_output, range(self._tensors), ctx.recorded)
        return *gradients, *(None for _ in ctx.recorded.options)

    def _differentiate(self, ctx, grad_output, positions, recorded: direct.Recorded) -> list[Tensor | None]:
        """Gradients of the tensors at these positions, which are what ctx tells of."""
        wanted = dict(zip(positions, ctx.needs_input_grad))
        needed = [wanted[position] for position in self.differentiable]
        saved = self._recall(ctx, recorded.options)
        # Grad mode is on for a second derivative: only the op knows how to refuse one.
        if (
            torch.is_grad_enabled()
            or not direct.nothing_watches()
            or direct.describe((grad_output, *saved)) not in recorded.described
        ):
            refuse_changes(self.name, self._names, recorded.saved, saved)
            backward = getattr(torch.ops.vitkern, f"{self.name}_backward")
            gradients = backward(grad_output, needed, *saved, *recorded.options)
        else:
            gradients = self._gradients(recorded.plan, grad_output, needed, saved)
        found = dict(zip(self.differentiable, gradients)) | dict.fromkeys(self._passed_on, grad_output)
        return [found.get(position) if wanted[position] else None for position in positions]

    def _refuse(self, ctx, *grads):
        raise NotImplementedError(
            f"vitkern.{self.name} has no second derivative in its kernels; backend='reference' has those of any order"
        )
