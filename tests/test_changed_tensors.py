# SPDX-License-Identifier: Apache-2.0
"""Tensors that have changed since forward: inputs, kept tensors, or the memory behind them.

Autograd detects changes in place, but not the changes tried here: each must leave the gradient right, or raise an error
that names the op and the tensor. Without these checks most of them would end the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vitkern
from tests.runners import RUNNERS, Runner
from vitkern.cases import AdapterBottleneckCase, MsDeformAttnCase, TokenCase, make_inputs
from vitkern.ops.op import forget_plans


@dataclass(frozen=True)
class Subject:
    name: str
    make: Callable[[], dict[str, Tensor]]  # the tensors by the names of the op's arguments
    unsaved: str = ""  # the tensor that backward does not need
    keeps: tuple[str, ...] = ()  # the backward op's names of the outputs that it needs
    options: tuple = (None,)  # of the op

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        made = {name: t.float() if t.is_floating_point() else t for name, t in self.make().items()}
        tensors = {name: tensor.to(device, copy=True) for name, tensor in made.items()}
        return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}

    @property
    def saved(self) -> list[str]:
        return [name for name in self.make() if name != self.unsaved]

    def call(self, tensors: dict[str, Tensor], backend: str | None = "cpu") -> Tensor:
        return getattr(vitkern, self.name)(**tensors, backend=backend)


def _attention() -> dict[str, Tensor]:
    case = MsDeformAttnCase("small", "", 2, ((4, 3), (2, 2)), 5, 2, 8, 2)
    return vars(make_inputs(case, locations="uniform"))


def _fused() -> dict[str, Tensor]:
    value, shapes, starts, locations, weights = _attention().values()
    return {
        "value": value,
        "spatial_shapes": shapes,
        "level_start_index": starts,
        "reference_points": torch.rand(2, 5, 1, 4, generator=torch.Generator().manual_seed(1)),
        "sampling_offsets": locations,
        "attention_logits": weights.flatten(3),
    }


_TOKENS = TokenCase("small", "", 2, 9, 12, 3)

SUBJECTS = [
    Subject("ms_deform_attn", _attention, options=(None, "bilinear", None)),
    Subject("ms_deform_attn_fused", _fused, options=(None, "bilinear", None)),
    Subject(
        "adapter_bottleneck",
        AdapterBottleneckCase("small", "", (6,), 12, 4).make,
        "residual",
        ("kept_0",),
        (1.0, 0.0, "relu", False, True, None),
    ),
    Subject(
        "token_pool",
        lambda: dict(zip(("x", "weight"), _TOKENS.make_pool(recurrent=False))),
        keeps=("result", "kept_0"),
    ),
    Subject(
        "token_project",
        lambda: dict(zip(("x", "query", "key", "tokens"), _TOKENS.make_project(keys=4))),
        "x",
    ),
]


def _freed(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


# Functions that replace a tensor by another.
SWAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda t: t.new_empty(0),
    "first-row": lambda t: t[:1].clone(),
    "one-axis-more": lambda t: t.expand(2, *t.shape).contiguous(),
    "half": lambda t: t.to(torch.float16 if t.is_floating_point() else torch.int32),
    "double": lambda t: t.to(torch.float64 if t.is_floating_point() else torch.int16),
    "other-strides": lambda t: torch.stack((t, t), -1)[..., 0],
    "other-memory": lambda t: t.clone(),
}
UNPACKED = {**SWAPS, "elsewhere": lambda t: t.to("meta"), "freed": _freed}


def _swap(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def apply(tensor: Tensor) -> None:
        tensor.data = change(tensor.detach())

    return apply


def _resize(kept: float) -> Callable[[Tensor], None]:
    def apply(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storage.resize_(int(storage.nbytes() * kept))

    return apply


CHANGES = {name: _swap(change) for name, change in SWAPS.items()}
CHANGES |= {"freed": _resize(0), "shrunk": _resize(0.9)}


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Calling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


# Without a watcher the fast path leads to the kernel; with one, the dispatcher's.
WATCHERS = {"unwatched": contextlib.nullcontext, "dispatch-mode": Dispatching, "function-mode": Calling}

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
each_watcher = pytest.mark.parametrize("watcher", WATCHERS)


def leaves(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


def gradients(output: Tensor, tensors: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, leaves(tensors), torch.ones_like(output), **options)


def usable(tensor: Tensor, like: Tensor) -> bool:
    whole = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    kind = tensor.shape, tensor.dtype, tensor.device
    return whole and kind == (like.shape, like.dtype, like.device)


def refused(subject: Subject, name: str):
    return pytest.raises((RuntimeError, ValueError), match=rf"{subject.name}: {name} (has changed|must)")


def check(subject, name, right, differentiate, tensors):
    """Checks that differentiate() gives the right gradient or is refused."""
    if not right:
        with refused(subject, name):
            differentiate()
        return
    for ours, expected in zip(differentiate(), gradients(subject.call(tensors, "reference"), tensors)):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def check_changed(subject, change, backend="cpu", device="cpu", before=lambda output, tensors: None):
    """Changes each saved tensor in turn after forward."""
    for name in subject.saved:
        tensors = subject.tensors(device)
        output = subject.call(tensors, backend)
        before(output, tensors)
        CHANGES[change](tensors[name])
        right = usable(tensors[name], subject.tensors(device)[name])
        check(subject, name, right, lambda o=output, t=tensors: gradients(o, t), tensors)


@each_watcher
@pytest.mark.parametrize("change", CHANGES)
@each_subject
def test_changed_between_the_passes(subject, change, watcher):
    with WATCHERS[watcher]():
        check_changed(subject, change)


ROUTES = [
    pytest.param(runner, id=runner.name, marks=runner.marks)
    for runner in RUNNERS
    if runner.backend != "cpu"  # which all others are about
]


@pytest.mark.parametrize("change", ["first-row", "half", "other-strides", "shrunk"])
@each_subject
@pytest.mark.parametrize("runner", ROUTES)
def test_changed_between_the_passes_of_other_backends(runner: Runner, subject, change):
    with runner.active():
        check_changed(subject, change, runner.backend, runner.device)


@pytest.mark.parametrize("change", CHANGES)
@each_subject
def test_changed_between_two_backward_passes(subject, change):
    check_changed(subject, change, before=lambda output, t: gradients(output, t, retain_graph=True))


@each_watcher
@pytest.mark.parametrize("change", UNPACKED)
@each_subject
def test_hooks_that_unpack_another_tensor(subject, change, watcher):
    """Replaces each saved tensor in turn, including those that forward kept."""
    names = [*subject.saved, *(name for name in subject.keeps if name != "result")]
    for changed, name in enumerate(names):
        tensors, packed = subject.tensors(), []

        def pack(tensor, packed=packed):
            packed.append(tensor)
            return len(packed) - 1

        def unpack(index, packed=packed, changed=changed):
            return UNPACKED[change](packed[index].detach()) if index == changed else packed[index]

        with WATCHERS[watcher](), saved_tensors_hooks(pack, unpack):
            output = subject.call(tensors)
            assert len(packed) == len(names)
            right = usable(UNPACKED[change](packed[changed].detach()), packed[changed])
            check(subject, name, right, lambda o=output, t=tensors: gradients(o, t), tensors)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("change", ["empty", "first-row", "half", "other-strides", "freed"])
@each_subject
def test_changed_before_a_checkpoint_recomputes(subject, change, reentrant):
    tensors = subject.tensors()
    name = subject.saved[-1]

    def function(*values):
        return subject.call(dict(zip(tensors, values)))

    output = checkpoint(function, *tensors.values(), use_reentrant=reentrant)
    CHANGES[change](tensors[name])
    raised = None
    try:
        output.sum().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        raised = error
    if raised is not None:
        assert not usable(tensors[name], subject.tensors()[name]), raised
        return
    # The reentrant kind runs all of forward again, on what the tensors are now.
    expected = gradients(subject.call(tensors, "reference").sum(), tensors)
    for leaf, gradient in zip(leaves(tensors), expected):
        torch.testing.assert_close(leaf.grad, gradient.to(leaf.grad.dtype), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("planned", [False, True], ids=["first-call", "planned"])
@pytest.mark.parametrize("change", ["freed", "shrunk"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@each_subject
def test_memory_that_is_gone_before_forward(subject, backend, change, planned):
    for name in subject.make():
        tensors = subject.tensors()
        if planned:
            subject.call(tensors, backend)
        else:
            forget_plans()
        CHANGES[change](tensors[name])
        with refused(subject, name):
            subject.call(tensors, backend)


def test_memory_that_is_gone_before_the_op():
    for mode in (contextlib.nullcontext, torch.inference_mode, Dispatching):
        x, weight = SUBJECTS[3].tensors().values()
        weight.untyped_storage().resize_(8)
        with pytest.raises(ValueError, match="token_pool: weight must have memory for"), mode():
            torch.ops.vitkern.token_pool(x, weight)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("change", UNPACKED)
@each_subject
def test_the_backward_op_checks_what_it_is_given(subject, change, fake):
    """Exported and edited graphs reach it without a forward pass before it."""
    if fake and change in ("elsewhere", "freed"):
        pytest.skip("a fake tensor has no memory")
    tensors = {name: tensor.detach() for name, tensor in subject.tensors().items()}
    if subject.name == "adapter_bottleneck":
        tensors["seed"] = None
    outputs = getattr(torch.ops.vitkern, subject.name)(*tensors.values(), *subject.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = {"grad_output": torch.ones_like(outputs[0]), **tensors}
    given |= zip(subject.keeps, outputs[len(outputs) - len(subject.keeps) :])
    op = getattr(torch.ops.vitkern, f"{subject.name}_backward")
    needed = [True] * op.default._schema.arguments[1].N

    def run(given):
        grad_output, *others = (t.to("meta") if fake and t is not None else t for t in given.values())
        return op(grad_output, needed, *others, *subject.options)

    expected = run(given)
    for name in ("grad_output", *subject.keeps):
        swapped = UNPACKED[change](given[name])
        if usable(swapped, given[name]):
            for ours, theirs in zip(run(given | {name: swapped}), expected):
                assert fake or torch.equal(ours, theirs)
        else:
            with refused(subject, name):
                run(given | {name: swapped})


@each_watcher
@each_subject
def test_a_result_may_be_changed_in_place(subject, watcher):
    """As in plain torch, where no formula needs its result for backward. token_pool's kernels do need it."""
    tensors = subject.tensors()
    with WATCHERS[watcher]():
        output = subject.call(tensors)
        expected = gradients(output, tensors, retain_graph=True)
        ours = gradients(output.mul_(2), tensors)
    for gradient, once in zip(ours, expected):
        torch.testing.assert_close(gradient, 2 * once)


@each_watcher
def test_a_result_that_lost_its_memory(watcher):
    tensors = SUBJECTS[3].tensors()
    with WATCHERS[watcher]():
        output = SUBJECTS[3].call(tensors)
        gradient = torch.ones_like(output)
        output.untyped_storage().resize_(4)
        with pytest.raises(ValueError, match="token_pool: result must have memory for"):
            torch.autograd.grad(output, leaves(tensors), gradient)


def test_the_backward_op_names_the_gradients_that_there_are():
    x, query, key, tokens = (tensor.detach() for tensor in SUBJECTS[4].tensors().values())
    with pytest.raises(ValueError, match="token_project: needed must be 3 truth values, got"):
        torch.ops.vitkern.token_project_backward(x, [True], None, query, key, tokens)


def test_what_is_none_has_no_gradient():
    tensors = {name: tensor.detach() for name, tensor in SUBJECTS[2].tensors().items()}
    tensors |= {"down_bias": None, "residual": None, "seed": None}
    output, kept = torch.ops.vitkern.adapter_bottleneck(*tensors.values())
    op = torch.ops.vitkern.adapter_bottleneck_backward
    gradients = op(output, [True] * 6, *tensors.values(), kept)
    assert [gradient.numel() > 0 for gradient in gradients] == [True, True, False, True, True, True]
