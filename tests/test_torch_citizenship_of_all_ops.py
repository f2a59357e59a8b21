# SPDX-License-Identifier: Apache-2.0
"""Every op, by its record, in torch: dispatcher, compiler, exporter, autocast, checkpoints, transforms.

test_torch_citizenship.py tests the machinery that all ops share in more detail, on ms_deform_attn only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vitkern
from vitkern.cases import AdapterBottleneckCase, MsDeformAttnCase, TokenCase
from vitkern.cases.ops import OPS
from vitkern.cases.record import Case, Setting
from vitkern.ops import flops as flops  # registers the counts

TOKENS = TokenCase("small", "", 2, 9, 12, 3)
ATTENTION = MsDeformAttnCase("small", "", 2, ((6, 5), (3, 2)), 5, 2, 8, 3)
SMALL: dict[str, tuple[Case, dict]] = {
    "ms_deform_attn": (ATTENTION, {}),
    "ms_deform_attn_fused": (ATTENTION, {"form": "shared boxes"}),
    "adapter_bottleneck": (AdapterBottleneckCase("small", "", (2, 5), 12, 4), {"activation": "silu"}),
    "token_pool": (TOKENS, {"recurrent": True}),
    "token_project": (TOKENS, {"keys": 4}),
}
# Other options in the schema of an op.
MORE: list[tuple[str, dict]] = [
    ("ms_deform_attn", {"points_per_level": (4, 2)}),
    ("ms_deform_attn", {"points_per_level": (3, 3), "method": "nearest"}),
    ("ms_deform_attn_fused", {"points_per_level": (1, 2)}),
    ("adapter_bottleneck", {"dropout_p": 0.4, "training": True, "activation": "gelu"}),
    ("adapter_bottleneck", {"residual": "x"}),
]


class Citizen:
    """An op as a function of all its tensors; tensors without a gradient come last."""

    def __init__(self, name: str, options: dict) -> None:
        setting = Setting("small", SMALL[name][0], options=options)
        self.name, self.problem = name, OPS[name].problem(setting, device="cpu", seed=0)
        self.differentiable = range(len(self.problem.inputs))

    def tensors(self, dtype=torch.float32, requires_grad=False) -> tuple[Tensor, ...]:
        inputs = (tensor.to(dtype, copy=True) for tensor in self.problem.inputs.values())
        return (*(tensor.requires_grad_(requires_grad) for tensor in inputs), *self.problem.tables)

    def call(self, *tensors, backend=None) -> Tensor:
        count = len(tensors) - len(self.problem.tables)
        return self.problem.call(*tensors[:count], backend=backend, tables=tensors[count:])


class Recorder(TorchDispatchMode):
    """Records the calls of the package's ops, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vitkern":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


CITIZENS = [Citizen(name, options) for name, (_, options) in SMALL.items()]


@pytest.fixture(params=CITIZENS, ids=lambda citizen: citizen.name)
def citizen(request) -> Citizen:
    return request.param


def gradients(citizen, function, tensors):
    leaves = [tensors[position] for position in citizen.differentiable]
    return torch.autograd.grad(function(*tensors).square().sum(), leaves)


def assert_keeps_the_rules(function, args):
    leaves = [
        arg.detach().requires_grad_(arg.is_floating_point()) if isinstance(arg, Tensor) else arg
        for arg in args
    ]
    torch.library.opcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(citizen, dtype):
    with Recorder() as seen:
        citizen.call(*citizen.tensors(dtype))
    ((function, args),) = seen.calls
    assert_keeps_the_rules(function, args)


@pytest.mark.parametrize("name, options", MORE, ids=str)
def test_opcheck_with_options(name, options):
    test_opcheck(Citizen(name, options), torch.float32)


@pytest.mark.parametrize("wanted", ["all", "second"])
def test_opcheck_of_the_backward(citizen, wanted):
    tensors = list(citizen.tensors(torch.float64, requires_grad=wanted == "all"))
    tensors[1].requires_grad_()
    output = citizen.call(*tensors)
    with Recorder() as seen:
        output.backward(torch.randn_like(output))
    ((function, args),) = seen.calls
    torch.library.opcheck(function, [arg.detach() if isinstance(arg, Tensor) else arg for arg in args])


# Multiplications with additions: D channels of each point's four corners; both products of the dense ops.
MULTIPLIED = {
    "ms_deform_attn": 2 * 5 * 2 * 6 * 4 * 8,
    "ms_deform_attn_fused": 2 * 5 * 2 * 6 * 4 * 8,
    "adapter_bottleneck": 10 * 12 * 4 * 2,
    "token_pool": 2 * 9 * 12 * 3 * 2,
    "token_project": 2 * 9 * 3 * (4 + 12),
}


def test_torch_counts_its_operations(citizen):
    with FlopCounterMode(display=False) as counter:
        output = citizen.call(*citizen.tensors(requires_grad=True))
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * MULTIPLIED[citizen.name]
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(citizen, dynamic):
    def function(*tensors):
        return citizen.call(*tensors).sin() * 2

    tensors = citizen.tensors(requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    for a, b in zip(gradients(citizen, compiled, tensors), gradients(citizen, function, tensors)):
        torch.testing.assert_close(a, b)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def test_exports_and_the_exported_program_trains(citizen):
    tensors = citizen.tensors(requires_grad=True)
    exported = torch.export.export(Module(citizen.call), tensors).module()
    torch.testing.assert_close(exported(*tensors), citizen.call(*tensors))
    for a, b in zip(gradients(citizen, exported, tensors), gradients(citizen, citizen.call, tensors)):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_refused(citizen):
    tensors = citizen.tensors(torch.float64, requires_grad=True)
    leaves = [tensors[position] for position in citizen.differentiable]
    output = citizen.call(*tensors).square().sum()
    with pytest.raises(NotImplementedError, match=f"vitkern.{citizen.name} has no second derivative"):
        first = torch.autograd.grad(output, leaves, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_transforms_without_a_kernel_say_so(citizen, transform):
    tensors = citizen.tensors()

    def function(first):
        return citizen.call(first, *tensors[1:]).sum()

    with pytest.raises(NotImplementedError, match=f"vitkern.{citizen.name}"):
        if transform == "jvp":
            torch.func.jvp(function, (tensors[0],), (tensors[0],))
        else:
            torch.func.grad(function)(tensors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype_and_gradients_come_back_in_theirs(citizen, dtype):
    tensors = citizen.tensors(requires_grad=True)
    with torch.autocast("cpu", dtype):
        output = citizen.call(*tensors)
    residual = citizen.name == "adapter_bottleneck"  # which stays what it is, and the sum with it
    assert output.dtype == (torch.float32 if residual else dtype)
    leaves = [tensors[position] for position in citizen.differentiable]
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.float().square().sum(), leaves)):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(citizen, reentrant):
    tensors = citizen.tensors(requires_grad=True)

    def checkpointed(*tensors):
        return checkpoint(citizen.call, *tensors, use_reentrant=reentrant)

    for leaf, a, b in zip(
        citizen.differentiable,
        _through_backward(citizen, checkpointed),
        gradients(citizen, citizen.call, tensors),
    ):
        torch.testing.assert_close(a, b, msg=str(leaf))


def _through_backward(citizen, function):
    """The gradients by backward(), because reentrant checkpoints do not support autograd.grad()."""
    tensors = citizen.tensors(requires_grad=True)
    function(*tensors).square().sum().backward()
    return [tensors[position].grad for position in citizen.differentiable]


def test_inference_mode_and_then_training(citizen):
    with torch.inference_mode():
        citizen.call(*citizen.tensors())
    assert all(
        g.isfinite().all() for g in gradients(citizen, citizen.call, citizen.tensors(requires_grad=True))
    )


def test_fake_and_meta_tensors_have_the_real_shapes(citizen):
    tensors = citizen.tensors()
    output = citizen.call(*tensors)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = citizen.call(*(mode.from_tensor(tensor) for tensor in tensors))
    meta = citizen.call(*(tensor.to("meta") for tensor in tensors))
    for other in (fake, meta):
        assert (other.shape, other.dtype, other.stride()) == (output.shape, output.dtype, output.stride())


def test_the_profiler_sees_it(citizen):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        citizen.call(*citizen.tensors())
    assert f"vitkern::{citizen.name}" in {event.key for event in profile.key_averages()}


Mistake = tuple[
    str, int, Callable[[Tensor], Tensor], str
]  # op, position of a tensor, what is done to it, message

MISTAKES: list[Mistake] = [
    ("adapter_bottleneck", 1, lambda t: t[:, 1:], r"down_weight must be \[H, C\] with C=12.*, got \[4, 11\]"),
    ("adapter_bottleneck", 2, lambda t: t[:1], r"down_bias must be \[H\] = \[4\], got \[1\]"),
    ("adapter_bottleneck", 3, lambda t: t.T, r"up_weight must be \[C, H\] = \[12, 4\], got \[4, 12\]"),
    ("adapter_bottleneck", 4, lambda t: t[:, None], r"up_bias must be \[C\] = \[12\], got \[12, 1\]"),
    ("adapter_bottleneck", 5, lambda t: t[0], r"residual must be \[2, 5, 12\], like x, got \[5, 12\]"),
    ("adapter_bottleneck", 6, lambda t: t.repeat(2), r"scale must be a number or a tensor of one element, got \[2\]"),
    ("adapter_bottleneck", 0, lambda t: t.int(), "x must be float32, float64, float16 or bfloat16, got torch.int32"),
    ("adapter_bottleneck", 4, lambda t: t.long(), "up_bias must be floating point, got torch.int64"),
    ("adapter_bottleneck", 3, lambda t: t.to("meta"), "up_weight must be on x's device cpu, got meta"),
    ("token_pool", 0, lambda t: t[0], r"x must be \[B, N, C\], got \[9, 12\]"),
    ("token_pool", 1, lambda t: t[:1], r"weight must be \[T, C\] or \[B, T, C\] with B=2, C=12, got \[1, 3, 12\]"),
    ("token_pool", 1, lambda t: t.long(), "weight must be floating point, got torch.int64"),
    ("token_project", 1, lambda t: t[:, 1:], r"query must be \[B, N, K\] with B=2, N=9, got \[2, 8, 4\]"),
    ("token_project", 2, lambda t: t[..., 1:], r"key must be \[B, T, K\] with B=2, K=4, got \[2, 3, 3\]"),
    ("token_project", 3, lambda t: t[:, 1:], r"tokens must be \[B, T, C\] = \[2, 3, 12\], got \[2, 2, 12\]"),
    ("token_project", 2, lambda t: t.double(), "key must be of x's dtype torch.float32, got torch.float64"),
    ("token_project", 2, lambda t: t.to_sparse(), "key must be a dense tensor, got torch.sparse_coo"),
]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[-1])
def test_a_mistake_is_named(mistake, backend):
    name, position, change, message = mistake
    citizen = next(citizen for citizen in CITIZENS if citizen.name == name)
    tensors = list(citizen.tensors())
    tensors[position] = change(tensors[position])
    with pytest.raises((ValueError, TypeError), match=f"{name}: {message}"):
        if citizen.name == "adapter_bottleneck":
            x, *parameters, residual, scale = tensors
            vitkern.adapter_bottleneck(x, *parameters, residual=residual, scale=scale, backend=backend)
        else:
            citizen.call(*tensors, backend=backend)


@pytest.mark.parametrize(
    "message, options",
    [
        ("activation must be 'relu', 'gelu' or 'silu', got 'tanh'", dict(activation="tanh")),
        ("dropout_p must be a probability between 0 and 1, got 1.5", dict(dropout_p=1.5, training=True)),
        ("dropout_p must be a probability between 0 and 1, got -0.1", dict(dropout_p=-0.1)),
    ],
)
def test_a_wrong_option_is_named(message, options):
    x, *parameters = next(each for each in CITIZENS if each.name == "adapter_bottleneck").tensors()[:5]
    with pytest.raises(ValueError, match=f"adapter_bottleneck: {message}"):
        vitkern.adapter_bottleneck(x, *parameters, **options)


def test_an_option_that_is_no_string_is_named():
    x, *parameters = next(each for each in CITIZENS if each.name == "adapter_bottleneck").tensors()[:5]
    with pytest.raises(TypeError, match="adapter_bottleneck: activation must be a string, got list"):
        vitkern.adapter_bottleneck(x, *parameters, activation=["relu"])
    with pytest.raises(TypeError, match="token_pool: backend must be a string or None, got list"):
        vitkern.token_pool(*TOKENS.make_pool(recurrent=True), backend=["cpu"])
