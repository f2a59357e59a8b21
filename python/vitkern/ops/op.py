# SPDX-License-Identifier: Apache-2.0
"""What every op of the library ``vitkern`` has in common: registration, fakes, autograd, and the short way in.

An op brings its schema, its checks and its launches; this file makes a citizen of torch of it. ``torch.ops.vitkern.X``
passes opcheck, compiles, exports, and trains after export; its backward is an op too, whose own derivative raises.
Where nothing but autograd watches, a call takes the short way of ``vitkern.ops.direct``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import direct, native

_library = torch.library.Library("vitkern", "FRAGMENT")

# Arguments that every schema ends with: which backend is to run, None for the best.
BACKEND = "str? backend=None"


class Op:
    """torch.ops.vitkern.<name>, with one output.

    Args:
        name: of the op; its backward is <name>_backward.
        schema: the arguments, tensors first, as torch.library writes them.
        defaults: of the arguments that are no tensors, which the dispatcher leaves out where they have them.
        differentiable: positions of the tensors that have a gradient.
        check: of all arguments, without reading elements, real or fake; returns the output's shape.
        forward: of all arguments; returns the output.
        backward: of grad_output, `needed` and all arguments; returns a gradient or None for each differentiable one.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        defaults: tuple,
        differentiable: tuple[int, ...],
        check: Callable[..., Sequence[int]],
        forward: Callable[..., Tensor],
        backward: Callable[..., Sequence[Tensor | None]],
    ) -> None:
        self.name, self.differentiable = name, differentiable
        self._defaults, self._check, self._forward, self._backward = defaults, check, forward, backward
        self._tensors = schema.count("Tensor ")
        self._arguments = self._tensors + len(defaults)
        count = len(differentiable)
        _library.define(f"{name}({schema}) -> Tensor")
        _library.define(
            f"{name}_backward(Tensor grad_output, bool[{count}] needed, {schema}) -> ({', '.join(['Tensor'] * count)})"
        )
        self._register(name, self._run_forward, self._fake_forward, self._differentiate, self._save)
        self._register(f"{name}_backward", self._run_backward, self._fake_backward, self._refuse, None)
        self._direct = self._autograd_function()

    @staticmethod
    def _register(name, real, fake, formula, save) -> None:
        _library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vitkern::{name}", fake, lib=_library)
        torch.library.register_autograd(f"vitkern::{name}", formula, setup_context=save, lib=_library)

    def __call__(self, *inputs: Any) -> Tensor:
        """The op with all its arguments, by the shortest way that nobody can tell from the dispatcher's."""
        tensors = inputs[: self._tensors]
        if not direct.nothing_watches(*tensors):
            return getattr(torch.ops.vitkern, self.name)(*inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self._direct.apply(*inputs)
        return self._forward(*inputs)

    def _complete(self, inputs: tuple) -> tuple:
        return (
            inputs + self._defaults[len(inputs) - self._arguments :]
            if len(inputs) < self._arguments
            else inputs
        )

    def _run_forward(self, *inputs):
        return self._forward(*self._complete(inputs))

    def _fake_forward(self, *inputs):
        return inputs[0].new_empty(self._check(*self._complete(inputs)))

    def _run_backward(self, grad_output, needed, *inputs):
        inputs = self._complete(inputs)
        self._check_grad_output(grad_output, inputs)
        likes = [inputs[position] for position in self.differentiable]
        grad_output = grad_output.to(inputs[0].dtype).contiguous()
        gradients = self._backward(grad_output, tuple(needed), *inputs)
        return tuple(
            like.new_empty(0) if gradient is None else gradient.to(like.dtype).view(like.shape)
            for gradient, like in zip(gradients, likes)
        )

    def _fake_backward(self, grad_output, needed, *inputs):
        inputs = self._complete(inputs)
        self._check_grad_output(grad_output, inputs)
        likes = [inputs[position] for position in self.differentiable]
        return tuple(like.new_empty(like.shape if need else 0) for like, need in zip(likes, needed))

    def _check_grad_output(self, grad_output, inputs) -> None:
        shape = tuple(self._check(*inputs))
        if grad_output.shape != shape:
            raise ValueError(f"{self.name}: grad_output must be {list(shape)}, got {list(grad_output.shape)}")

    def _save(self, ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[: self._tensors])
        ctx.options = inputs[self._tensors :]

    def _differentiate(self, ctx, grad_output):
        needed = [ctx.needs_input_grad[position] for position in self.differentiable]
        saved = ctx.saved_tensors  # under activation checkpointing, to be asked for once
        arguments = (grad_output, needed, *saved, *ctx.options)
        # With grad mode on somebody wants a second derivative: only the op knows how to refuse one.
        if not torch.is_grad_enabled() and direct.nothing_watches(grad_output, *saved):
            gradients = self._run_backward(*arguments)
        else:
            gradients = getattr(torch.ops.vitkern, f"{self.name}_backward")(*arguments)
        of_inputs: list[Tensor | None] = [None] * (len(saved) + len(ctx.options))
        for position, need, gradient in zip(self.differentiable, needed, gradients):
            of_inputs[position] = gradient if need else None
        return tuple(of_inputs)

    def _refuse(self, ctx, *grads):
        raise NotImplementedError(
            f"vitkern.{self.name} has no second derivative in its kernels; backend='reference' has those of any order"
        )

    def _autograd_function(self) -> type[torch.autograd.Function]:
        """The implementation and its gradient without the dispatcher between them."""
        op = self

        def forward(ctx, *inputs):
            output = op._forward(*inputs)
            op._save(ctx, inputs, output)
            return output

        def backward(ctx, grad_output):
            return op._differentiate(ctx, grad_output)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(op.name, (torch.autograd.Function,), methods)


def kernel(name: str, backend: str) -> Callable[..., Any]:
    """The launch function of this name for a backend; Triton is imported when first needed."""
    if backend == "triton":
        from vitkern.ops import triton_launch

        return getattr(triton_launch, f"{name}_triton")
    if backend == "reference":
        raise RuntimeError(f"the plain torch reference is no kernel: call vitkern's function with {backend=}")
    return getattr(native, f"{name}_{backend}")
