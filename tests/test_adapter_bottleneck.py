# SPDX-License-Identifier: Apache-2.0
"""adapter_bottleneck beyond its contract in test_contract.py: mistakes, memory, mixed dtypes, the mask of dropout."""

from __future__ import annotations

import pytest
import torch

import vitkern
from tests.helpers import gradients
from vitkern.cases import AdapterBottleneckCase

SMALL = AdapterBottleneckCase("small", "", (2, 11), 40, 12)


def make(case, runner, dtype=torch.float32, seed=0):
    """x, both weights and biases, a residual and a learnable scale, by name."""
    tensors = case.make(dtype=torch.float64, device=runner.device, seed=seed)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def call(names, backend, seed=3, **options):
    """A function that calls adapter_bottleneck with the named tensors only, and always the same random numbers."""

    def function(*tensors):
        torch.manual_seed(seed)
        arguments = dict(zip(names, tensors))
        x, *parameters = (
            arguments.pop(name, None) for name in ("x", "down_weight", "down_bias", "up_weight", "up_bias")
        )
        residual = x if options.get("residual") == "x" else arguments.pop("residual", None)
        others = {name: option for name, option in options.items() if name != "residual"}
        return vitkern.adapter_bottleneck(
            x, *parameters, **{**arguments, **others, "residual": residual}, backend=backend
        )

    return function


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        (
            "residual",
            torch.zeros(1, 5, 12).double(),
            r"residual must be \[2, 5, 12\], like x, got \[1, 5, 12\]",
        ),
        ("residual", torch.zeros(2, 5, 12).long(), "residual must be floating point, got torch.int64"),
        ("residual", 1.0, "residual must be a tensor or None, got float"),
        ("x", None, "x must be a tensor, got NoneType"),
        ("up_weight", None, "up_weight must be a tensor, got NoneType"),
        ("down_bias", 0.0, "down_bias must be a tensor or None, got float"),
    ],
)
def test_no_tensor_or_a_residual_that_does_not_fit_is_named(name, wrong, message):
    tensors = AdapterBottleneckCase("small", "", (2, 5), 12, 4).make()
    with pytest.raises((TypeError, ValueError), match=f"adapter_bottleneck: {message}"):
        call(tensors, "cpu")(*{**tensors, name: wrong}.values())


@pytest.mark.parametrize("name, wrong", [("scale", "large"), ("scale", None), ("dropout_p", None)])
def test_what_is_no_number_is_named(name, wrong):
    tensors = AdapterBottleneckCase("small", "", (5,), 12, 4).make()
    positional = [tensors[key] for key in ("x", "down_weight", "down_bias", "up_weight", "up_bias")]
    with pytest.raises(TypeError, match=f"adapter_bottleneck: {name} must be a number, got {wrong!r}"):
        vitkern.adapter_bottleneck(*positional, training=True, **{name: wrong})


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)], ids=str)
def test_the_result_may_be_changed_in_place(runner, leading):
    tensors = make(AdapterBottleneckCase("small", "", leading, 12, 4), runner)
    function = call(tensors, runner.backend)
    doubled = gradients(lambda *leaves: function(*leaves).mul_(2), tuple(tensors.values()))
    for ours, once in zip(doubled, gradients(function, tuple(tensors.values()))):
        torch.testing.assert_close(ours, 2 * once)


@pytest.mark.parametrize("residual", ["x", "another"])
def test_nothing_as_large_as_x_is_saved_but_x(residual):
    tensors = AdapterBottleneckCase("tall", "", (500,), 64, 4).make()
    options = dict(dropout_p=0.1, training=True)
    if residual == "x":
        del tensors["residual"]
        options["residual"] = "x"
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        call(tensors, "cpu", **options)(*leaves)
    large = {tensor.data_ptr() for tensor in saved if tensor.numel() >= leaves[0].numel()}
    assert large == {leaves[0].data_ptr()}


def test_weights_of_another_dtype_are_converted_and_get_gradients_of_their_own(runner):
    tensors = make(SMALL, runner, torch.bfloat16)
    wide = {name: t if name in ("x", "residual") else t.float() for name, t in tensors.items()}
    narrow = gradients(call(tensors, runner.backend), tuple(tensors.values()))
    for name, a, b in zip(
        ("output", *wide), gradients(call(wide, runner.backend), tuple(wide.values())), narrow
    ):
        assert a.dtype == (torch.bfloat16 if name in ("output", "x", "residual") else torch.float32), name
        torch.testing.assert_close(a.to(b.dtype), b, msg=name)


def test_nothing_kept_where_no_gradient_is_recorded(runner):
    """If forward has not kept z, backward computes it again, with the same result."""
    tensors = make(SMALL, runner)
    inputs = [
        tensors[n] for n in ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "scale")
    ]
    grad_output, needed = torch.randn_like(tensors["x"]), [True] * 6
    results = []
    for keep in (True, False):
        options = (1.0, 0.0, "gelu", False, keep, runner.backend)
        _, kept = torch.ops.vitkern.adapter_bottleneck(*inputs, None, *options)
        results.append(
            torch.ops.vitkern.adapter_bottleneck_backward(grad_output, needed, *inputs, None, kept, *options)
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


class TestDropout:
    """The dropout mask: which hidden units and how many are dropped, and by which random numbers."""

    def mask(self, p, *, backend="cpu", rows=400, hidden=256, training=True):
        """The hidden units that are kept: all units are 1, and the h-th output is unit h."""
        x, down, up = torch.ones(rows, hidden), torch.eye(hidden), torch.eye(hidden)
        return vitkern.adapter_bottleneck(
            x, down, None, up, None, dropout_p=p, training=training, backend=backend
        )

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_statistics(self, p):
        kept = self.mask(p)
        assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
        dropped = (kept == 0).double()
        deviation = (p * (1 - p)) ** 0.5
        assert abs(dropped.mean() - p) < 4 * deviation / dropped.numel() ** 0.5
        for axis in (0, 1):  # every row and every unit is dropped equally often
            assert (dropped.mean(axis) - p).abs().max() < 5 * deviation / dropped.shape[axis] ** 0.5
        for shift in ((1, 0), (0, 1), (0, 4), (1, 1)):  # and neighbours are independent
            together = (dropped * dropped.roll(shift, (0, 1))).mean()
            assert abs(together - p * p) < 5 * p / dropped.numel() ** 0.5

    def test_follows_the_generator(self):
        torch.manual_seed(1)
        first, second = self.mask(0.5), self.mask(0.5)
        torch.manual_seed(1)
        assert torch.equal(self.mask(0.5), first)
        assert not torch.equal(first, second)

    def test_none_outside_of_training(self):
        state = torch.get_rng_state()
        assert torch.equal(self.mask(0.5, training=False), torch.ones(400, 256))
        assert torch.equal(torch.get_rng_state(), state), "evaluation drew a random number"

    @pytest.mark.parametrize("trained", ["eager", "compiled", "checkpointed"])
    def test_backward_draws_the_same_mask(self, trained):
        """The output is linear in x here, so gradient times x is the output."""
        x = torch.rand(50, 32, requires_grad=True)

        def function(x):
            eye = torch.eye(32)
            return vitkern.adapter_bottleneck(x, eye, None, eye, None, dropout_p=0.5, training=True)

        run = function
        if trained == "compiled":
            run = torch.compile(function, fullgraph=True)
        if trained == "checkpointed":
            run = lambda x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)  # noqa: E731
        output = run(x)
        output.sum().backward()
        torch.testing.assert_close(x.grad * x, output)
        assert 0.3 < (output == 0).double().mean() < 0.7
