# SPDX-License-Identifier: Apache-2.0
"""What every op owes to torch, op by op: dispatcher, compiler, exporter, autocast, checkpointing, transforms, errors.

test_torch_citizenship.py goes further, on ms_deform_attn alone: what is special there is the machinery that all share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vitkern
from vitkern.cases import AdapterBottleneckCase, MsDeformAttnCase, TokenCase, make_inputs


@dataclass(frozen=True)
class Citizen:
    name: str
    make: Callable[[torch.dtype], tuple[Tensor, ...]]  # the op's tensors
    differentiable: tuple[int, ...]
    call: Callable[..., Tensor]  # the public function on these tensors
    options: tuple[Any, ...] = ()  # of the op itself, without the backend

    @property
    def op(self):
        return getattr(torch.ops.vitkern, self.name).default

    def tensors(self, dtype=torch.float32, requires_grad=False) -> tuple[Tensor, ...]:
        tensors = self.make(dtype)
        for position in self.differentiable if requires_grad else ():
            tensors[position].requires_grad_()
        return tensors


def _attention(dtype):
    case = MsDeformAttnCase("small", "", 2, ((6, 5), (3, 2)), 5, 2, 8, 3)
    return tuple(make_inputs(case, locations="uniform", dtype=dtype))


def _fused(dtype):
    value, shapes, starts, locations, weights = _attention(dtype)
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(2, 5, 1, 4, generator=generator, dtype=torch.float64).to(dtype)
    return value, shapes, starts, boxes, locations, weights.flatten(3)


def _adapter(dtype):
    tensors = AdapterBottleneckCase("small", "", (2, 5), 12, 4).make(dtype=dtype)
    return (*tensors.values(), torch.tensor([7]))


def _adapt(x, down_weight, down_bias, up_weight, up_bias, residual, scale, _):
    parameters = down_weight, down_bias, up_weight, up_bias
    return vitkern.adapter_bottleneck(x, *parameters, residual=residual, scale=scale, activation="silu")


_TOKENS = TokenCase("small", "", 2, 9, 12, 3)

CITIZENS = [
    Citizen("ms_deform_attn", _attention, (0, 3, 4), vitkern.ms_deform_attn),
    Citizen("ms_deform_attn_fused", _fused, (0, 3, 4, 5), vitkern.ms_deform_attn_fused),
    Citizen("adapter_bottleneck", _adapter, tuple(range(7)), _adapt, (2.0, 0.4, "gelu", False, True)),
    Citizen(
        "token_pool",
        lambda dtype: tuple(t.to(dtype) for t in _TOKENS.make_pool(recurrent=True)),
        (0, 1),
        vitkern.token_pool,
    ),
    Citizen(
        "token_project",
        lambda dtype: tuple(t.to(dtype) for t in _TOKENS.make_project(keys=4)),
        (0, 1, 2, 3),
        vitkern.token_project,
    ),
]


@pytest.fixture(params=CITIZENS, ids=lambda citizen: citizen.name)
def citizen(request) -> Citizen:
    return request.param


def gradients(citizen, function, tensors):
    leaves = [tensors[position] for position in citizen.differentiable]
    return torch.autograd.grad(function(*tensors).square().sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(citizen, dtype):
    torch.library.opcheck(citizen.op, (*citizen.tensors(dtype, requires_grad=True), *citizen.options))


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
    """Reentrant checkpoints know backward() but not autograd.grad()."""
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
            x, *parameters, residual, scale, _ = tensors
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
    x, *parameters = _adapter(torch.float32)[:5]
    with pytest.raises(ValueError, match=f"adapter_bottleneck: {message}"):
        vitkern.adapter_bottleneck(x, *parameters, **options)


def test_an_option_that_is_no_string_is_named():
    x, *parameters = _adapter(torch.float32)[:5]
    with pytest.raises(TypeError, match="adapter_bottleneck: activation must be a string, got list"):
        vitkern.adapter_bottleneck(x, *parameters, activation=["relu"])
    with pytest.raises(TypeError, match="token_pool: backend must be a string or None, got list"):
        vitkern.token_pool(*_TOKENS.make_pool(recurrent=True), backend=["cpu"])
