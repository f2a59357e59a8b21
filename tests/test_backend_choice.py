# SPDX-License-Identifier: Apache-2.0
"""The choice of the backend: named in the call or by a variable, chosen automatically, or refused with the reason."""

import functools
import importlib
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.test_torch_citizenship import attend, make
from vitkern import _C
from vitkern.ops import backends, fast_path, private
from vitkern.ops import ms_deform_attn as ops
from vitkern.ops.op import forget_plans


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_plans()
    inputs = make(torch.float32)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here: "):
        attend(*inputs, backend=backend)
    forget_plans()


def test_an_environment_variable_picks_the_backend():
    program = """
        import torch, vitkern
        value, shapes = torch.ones(1, 4, 1, 2), [(2, 2)]
        locations, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        value.requires_grad_()
        print(type(vitkern.ms_deform_attn(value, shapes, None, locations, weights).grad_fn).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]

    def run(backend):
        environment = {**os.environ, "VITKERN_BACKEND": backend}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("reference").stdout == "ViewBackward0\n"  # of plain torch's last operation
    assert run("cpu").stdout == "ms_deform_attnBackward\n"
    assert "VITKERN_BACKEND must be one of cpu, cuda, triton, reference, got 'gpu'" in run("gpu").stderr
    assert "VITKERN_BACKEND 'cuda' cannot run here: " in run("cuda").stderr or torch.cuda.is_available()


@pytest.mark.parametrize(
    "architectures, capability, fits",
    [
        ("80-real 90 100-real 120", (8, 0), True),
        ("80-real 90 100-real 120", (8, 9), True),
        ("80-real 90 100-real 120", (7, 5), False),
        ("80-real 90 100-real 120", (11, 0), True),
        ("80-real 90 100-real 120", (12, 1), True),
        ("80-real 90-real", (10, 0), False),
        ("80", (10, 0), True),
        ("90-virtual", (10, 0), True),
        ("90-virtual", (8, 0), False),
    ],
)
def test_which_cards_a_build_serves(architectures, capability, fits):
    assert (backends._no_image_for(capability, architectures) is None) == fits


@pytest.mark.parametrize(
    "driver, runtime, objection",
    [
        (0, 12080, "need a driver for CUDA 12.0 or later, and no NVIDIA driver was found: install one"),
        (0, 13000, "need a driver for CUDA 13.0 or later, and no NVIDIA driver was found: install one"),
        (12020, 12080, None),
        (
            12020,
            13000,
            "13.0 or later, the driver here is for CUDA 12.2: update it, or build vitkern with nvcc 12",
        ),
        (12090, 12080, None),
        (
            12090,
            13000,
            "13.0 or later, the driver here is for CUDA 12.9: update it, or build vitkern with nvcc 12",
        ),
        (13000, 12080, None),
        (13000, 13000, None),
    ],
)
def test_which_drivers_a_build_runs_with(driver, runtime, objection):
    found = backends.driver_objection(driver, runtime)
    assert found is None if objection is None else found.endswith(objection)


@pytest.fixture
def card(monkeypatch):
    """A fake card of a given capability and driver, for a build with nvcc 13.1."""

    def put(capability, driver):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(_C, "cuda_version", "13.1")
        monkeypatch.setattr(_C, "cuda_architectures", "80-real 90 100-real 120")
        monkeypatch.setattr(_C, "cuda_driver", lambda: (driver, 13010))
        return torch.device("cuda:0")

    return put


@pytest.mark.parametrize(
    "capability, driver, reason",
    [
        ((9, 0), 13000, None),
        ((9, 0), 12090, "the driver here is for CUDA 12.9"),
        ((11, 0), 13010, None),
        ((11, 0), 13000, "its driver is older than the nvcc that made their PTX: update the driver"),
        ((7, 5), 13010, "need a card of sm_80 or later, this one is sm_75"),
    ],
)
def test_a_card_and_its_driver_are_asked_before_the_first_call(card, capability, driver, reason, caplog):
    """Otherwise the kernels would be chosen and fail at every call. The test bypasses the cache of choices."""
    device = card(capability, driver)
    found = backends.can_run("cuda", device, torch.float32)
    assert found is None if reason is None else reason in found
    caplog.set_level("DEBUG", "vitkern")
    if reason is not None and backends.can_run("triton", device, torch.float32) is None:
        assert backends.choose.__wrapped__(device, torch.float32, None) == "triton"
        assert reason in caplog.text
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            backends.choose.__wrapped__(device, torch.float32, "cuda")


def test_a_call_is_described_alike_with_and_without_dlpack(monkeypatch):
    """Signatures agree with those read attribute by attribute, as from torch below 2.10 or without its C functions."""
    asking = _C.Signer(private.describe, private.room_by_python, torch.Tensor, torch.nn.Parameter)
    assert private.room() is not private.room_by_python, "torch has lost the functions that make this quick"
    tensor = torch.randn(2, 3, 4)
    plain = (tensor, tensor.double(), tensor[:1], tensor.transpose(0, 1), tensor[0], None, tensor.long())
    kinds = {"parameter": torch.nn.Parameter(tensor), "expanded": tensor[:1].expand(2, 3, 4)}
    for one in (*plain, *kinds.values()):
        assert fast_path.sign((one, tensor)) == asking((one, tensor)) is not None
    lazy = (torch._neg_view(tensor), torch._efficientzerotensor((2,)), tensor.to_sparse(), tensor.to("meta"))
    for one in lazy:
        assert fast_path.sign((tensor, one)) is asking((tensor, one)) is None
    monkeypatch.setattr(private, "borrow", lambda: private.describe)
    forget_plans()
    inputs = make().requires_grad_()
    attend(*inputs).sum().backward()
    assert inputs.value.grad is not None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tables_of_the_levels_are_of_any_whole_type(backend, dtype):
    value, shapes, starts, *others = make()
    want = attend(value, shapes, starts, *others, backend=backend)
    got = attend(value, shapes.to(dtype), starts.to(dtype), *others, backend=backend)
    assert torch.equal(got, want)


def test_plans_may_be_forgotten_at_any_time(monkeypatch):
    inputs, plan = make(), ops.ms_deform_attn._planned

    def planned(arguments):
        found = plan(arguments)
        forget_plans()  # as another thread may
        return found

    monkeypatch.setattr(ops.ms_deform_attn, "_planned", planned)
    forget_plans()
    assert attend(*inputs).shape == (2, 5, 16)


# An op, tensors beyond a limit of a backend's kernels, and the sentence about it. The tensors have no memory.
def _empty(*shape):
    return torch.empty(shape, device="meta")


_TABLES = (
    torch.empty(1025, 2, dtype=torch.int64, device="meta"),
    torch.empty(1025, dtype=torch.int64, device="meta"),
)
BEYOND = {
    "token_pool": ("triton", [_empty(1, 4, 8), _empty(257, 8)], "at most 256 tokens, got 257"),
    "token_project": (
        "triton",
        [_empty(1, 4, 8), _empty(1, 4, 2), _empty(1, 513, 2), _empty(1, 513, 8)],
        "at most 512, got 513",
    ),
    "adapter_bottleneck": (
        "triton",
        [_empty(4, 8), _empty(513, 8), None, _empty(8, 513), *[None] * 4],
        "at most 512 hidden units, got 513",
    ),
    "ms_deform_attn": (
        "cuda",
        [_empty(1, 0, 1, 1), *_TABLES, _empty(1, 1, 1, 1025, 1, 2), _empty(1, 1, 1, 1025, 1)],
        "at most 1024 levels in torch.float32, got 1025",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_limit_of_shape_is_told_before_a_launch(name):
    backend, tensors, sentence = BEYOND[name]
    module = importlib.import_module(f"vitkern.ops.{name}")
    inputs = getattr(module, "Inputs", None) or module.Plain
    reason = getattr(module, name).limits(backend, inputs(*tensors))
    assert reason is not None and sentence in reason
    assert getattr(module, name).limits("reference", inputs(*tensors)) is None


def test_another_backend_runs_beyond_a_limit_or_the_sentence_is_raised(monkeypatch):
    """Triton would be chosen, as on a card, and cannot take so many tokens."""
    monkeypatch.setattr(backends, "BACKENDS", ("triton", "cpu", "reference"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.choose.cache_clear()
    refusals = (("triton", "weight must have at most 256 tokens, got 257"),)
    choose = functools.partial(backends.choose, torch.device("cpu"), torch.float32)
    assert (choose(None), choose(None, refusals)) == ("triton", "cpu")
    with pytest.raises(
        RuntimeError, match="backend 'triton' cannot run here: weight must have at most 256 tokens, got 257"
    ):
        choose("triton", refusals)


def test_the_limits_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from vitkern.ops import adapter_bottleneck, token_pool, token_project
    from vitkern.triton_kernels import adapter_bottleneck as adapters
    from vitkern.triton_kernels import token_pool as pools
    from vitkern.triton_kernels import token_project as projects

    assert adapter_bottleneck.MOST_HIDDEN == adapters.MAX_HIDDEN
    assert (token_pool.MOST_TOKENS, token_project.MOST_TOKENS) == (pools.MAX_TOKENS, projects.MAX_TOKENS)


# Loads the module that finds private symbols of torch before the package, and hides one from it.
WITHOUT = """
import importlib.util, sys, torch
path, hidden = sys.argv[1:]
spec = importlib.util.spec_from_file_location("vitkern.ops.private", path)
private = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(private)
find = private.find
private.find = lambda name: None if name == hidden else find(name)
if hidden == "forward_ad":
    private.forward_ad = lambda: None
import vitkern
torch.manual_seed(0)
shapes = (2, 9, 8), (2, 9, 3), (2, 4, 3), (2, 4, 8)
tensors = [torch.rand(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
for _ in range(2):  # the first makes the plan
    got = [vitkern.token_project(*tensors, backend=backend) for backend in ("cpu", "reference")]
    torch.testing.assert_close(*got)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), tensors) for each in got))
with torch.autocast("cpu", torch.bfloat16):
    half = vitkern.token_project(*(tensor.float() for tensor in tensors))
assert half.dtype == torch.bfloat16
vitkern.ms_deform_attn(torch.rand(1, 6, 1, 4), [(2, 3)], None, torch.rand(1, 2, 1, 1, 2, 2), torch.rand(1, 2, 1, 1, 2))
fixed = [tensor.detach() for tensor in tensors]
try:
    tangent = torch.func.jvp(lambda x: vitkern.token_project(x, *fixed[1:], backend="cpu"), fixed[:1], fixed[:1])
    raise SystemExit(f"a derivative that no kernel has: {tangent}")
except (NotImplementedError, RuntimeError):
    pass
try:
    gradient = torch.func.grad(lambda q: vitkern.token_project(fixed[0], q, *fixed[2:], backend="cpu").sum())(fixed[1])
    reference = vitkern.token_project(*tensors, backend="reference").sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(reference, tensors[1])[0])
except (NotImplementedError, RuntimeError):
    pass
"""
SYMBOLS = (
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "autograd._profiler_enabled",
    "_C._is_tracing",
    "_C._functorch.peek_interpreter_stack",
    "_C._functorch.TransformType",
    "forward_ad",
    "_C._is_any_autocast_enabled",
    "_library.autograd.make_autograd_impl",
)


@pytest.mark.slow
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_torch_without_a_private_symbol_loses_speed_alone(symbol):
    command = [sys.executable, "-c", WITHOUT, private.__file__, symbol]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
