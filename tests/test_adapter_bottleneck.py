# SPDX-License-Identifier: Apache-2.0
"""adapter_bottleneck on every backend against the oracle in float64: each gradient, every dtype, every odd input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitkern
from tests.helpers import assert_matches_oracle, gradients, guarded_memory
from tests.runners import RUNNERS
from vitkern.cases import ADAPTER_CASES, AdapterBottleneckCase

LOW = (torch.float16, torch.bfloat16)
ACTIVATIONS = ("relu", "gelu", "silu")
SMALL = AdapterBottleneckCase("small", "", (2, 11), 40, 12)


def skip_dtype(runner, dtype):
    if dtype not in runner.dtypes:
        pytest.skip(f"{runner.backend} has no {dtype}")


def make(case, runner, dtype=torch.float32, seed=0):
    """x, both weights and biases, a residual and a learnable scale, by name."""
    tensors = case.make(dtype=torch.float64, device=runner.device, seed=seed)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def call(names, backend, seed=3, **options):
    """adapter_bottleneck of the tensors of these names, without the others; with the same random numbers each time."""

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


def check(tensors, runner, **options):
    ours, oracle = call(tensors, runner.backend, **options), call(tensors, "reference", **options)
    names = ("output", *(f"grad_{name}" for name in tensors))
    terms = (
        (oracle(*tensors.values()) - tensors.get("residual", 0)).abs().sum().item()
    )  # of the gradient of scale
    assert_matches_oracle(ours, oracle, tuple(tensors.values()), names, {"grad_scale": terms / 4})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
def test_matches_the_oracle(runner, dtype, activation):
    skip_dtype(runner, dtype)
    check(make(SMALL, runner, dtype), runner, activation=activation)


@pytest.mark.parametrize("absent", ["down_bias", "up_bias", "residual", "scale"])
def test_what_is_optional_may_be_absent(runner, absent):
    tensors = make(SMALL, runner)
    del tensors[absent]
    check(tensors, runner)


def test_nothing_but_the_weights(runner):
    tensors = make(SMALL, runner)
    tensors = {name: tensors[name] for name in ("x", "down_weight", "up_weight")}
    check(tensors, runner, scale=-0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_that_is_x(runner, dtype):
    tensors = make(SMALL, runner, dtype)
    del tensors["residual"]
    check(tensors, runner, residual="x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout(runner, p, dtype):
    check(make(SMALL, runner, dtype), runner, dropout_p=p, training=True, activation="gelu")


SIZES = [
    (1, 1, 1),
    (1, 768, 64),
    (7, 33, 5),
    (65, 48, 100),
    (130, 17, 512),
    (3, 2, 511),
    (33, 256, 16),
    (20, 40, 128),
]


@pytest.mark.parametrize("rows, channels, hidden", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_size(runner, rows, channels, hidden, dtype):
    check(make(AdapterBottleneckCase("any", "", (rows,), channels, hidden), runner, dtype), runner)


@pytest.mark.parametrize("name", sorted(ADAPTER_CASES))
def test_matches_the_oracle_on_shapes_of_real_models(runner, name):
    case = ADAPTER_CASES[name]
    if runner.slow and case.channels > 256:
        pytest.skip("too slow for a kernel that is emulated or interpreted")
    check(make(case.shrunk(), runner), runner)


EMPTIES = [((0,), 8, 4), ((2, 0, 3), 8, 4), ((5,), 0, 4)]


@pytest.mark.parametrize("shape, channels, hidden", EMPTIES)
def test_empty_inputs_give_empty_or_zero_results(runner, shape, channels, hidden):
    check(make(AdapterBottleneckCase("empty", "", shape, channels, hidden), runner), runner)


def test_one_row_without_leading_dimensions(runner):
    check(make(AdapterBottleneckCase("row", "", (), 24, 6), runner), runner)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_go_where_torch_lets_them_go(runner, bad, activation):
    tensors = make(SMALL, runner)
    tensors["x"][1, 3, 5] = bad
    options = dict(activation=activation)
    grad_output = torch.randn_like(tensors["x"])
    actual = gradients(call(tensors, runner.backend, **options), tuple(tensors.values()), grad_output)
    plain = gradients(call(tensors, "reference", **options), tuple(tensors.values()), grad_output)
    for name, a, p in zip(("output", *tensors), actual, plain):
        assert torch.equal(a.isnan(), p.isnan()), name


def test_any_strides(runner):
    tensors = make(SMALL, runner)
    expected = gradients(call(tensors, runner.backend), tuple(tensors.values()))
    strided = tuple(torch.stack([tensor] * 2, -1)[..., 1] for tensor in tensors.values())
    assert not strided[0].is_contiguous()
    for name, a, e in zip(("output", *tensors), gradients(call(tensors, runner.backend), strided), expected):
        torch.testing.assert_close(a, e, msg=name)


@pytest.mark.parametrize(
    "wanted",
    [
        ("x",),
        ("down_weight",),
        ("up_weight", "up_bias"),
        ("down_weight", "down_bias", "up_weight", "up_bias"),
        ("scale",),
        ("residual",),
        ("down_bias", "x"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("residual", ["given", "x"])
def test_only_the_gradients_that_are_asked_for(runner, wanted, residual):
    tensors = make(SMALL, runner)
    options = {}
    if residual == "x":
        del tensors["residual"]
        options["residual"] = "x"
        if wanted == ("residual",):
            pytest.skip("the residual is x")
    function = call(tensors, runner.backend, **options)
    everything = dict(zip(tensors, gradients(function, tuple(tensors.values()))[1:]))
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    output = function(*leaves.values())
    with guarded_memory():
        output.backward(torch.ones_like(output))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), name
        if name in wanted:
            torch.testing.assert_close(leaf.grad, everything[name], msg=name)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_is_bitwise_repeatable(runner, dtype):
    tensors = make(AdapterBottleneckCase("wide", "", (150,), 96, 24), runner, dtype)
    function = call(tensors, runner.backend, dropout_p=0.2, training=True)
    first = gradients(function, tuple(tensors.values()))
    for _ in range(2 if runner.slow else 10):
        again = gradients(function, tuple(tensors.values()))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [1, 5, 16, 40])
def test_gradcheck(runner, hidden, activation):
    skip_dtype(runner, torch.float64)
    tensors = make(AdapterBottleneckCase("check", "", (3,), 7, hidden), runner, torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors.values())
    function = call(tensors, runner.backend, activation=activation, dropout_p=0.3, training=True)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=runner.slow)


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
    """Backward works z out again where forward has not kept it, with the same result."""
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


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    channels=st.integers(1, 70),
    hidden=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.float64, *LOW]),
    p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 999),
)
def test_any_shape_on_the_cpu(shape, channels, hidden, activation, dtype, p, seed):
    tensors = make(
        AdapterBottleneckCase("drawn", "", tuple(shape), channels, hidden), RUNNERS[0], dtype, seed
    )
    check(tensors, RUNNERS[0], activation=activation, dropout_p=p, training=True)


class TestDropout:
    """The mask: which units fall, how many, and who decides."""

    def mask(self, p, *, backend="cpu", rows=400, hidden=256, training=True):
        """What survives where every hidden unit is 1 and unit h is the h-th output."""
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
        for axis in (0, 1):  # every row and every unit falls as often
            assert (dropped.mean(axis) - p).abs().max() < 5 * deviation / dropped.shape[axis] ** 0.5
        for shift in ((1, 0), (0, 1), (0, 4), (1, 1)):  # and neighbours know nothing of each other
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
