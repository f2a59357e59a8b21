# SPDX-License-Identifier: Apache-2.0
"""Tests of every op and GPU backend on a card: each dtype with and without deterministic mode, streams, a second
device, graphs, torch.compile. Tests in other files run on the card too, with more inputs (`-m gpu`)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vitkern
from tests.helpers import gradients
from vitkern.bench.cuda_clock import CudaClock
from vitkern.bench.verify import complaint, errors_of, exact_results
from vitkern.cases import ATTENTION_CASES, make_inputs
from vitkern.cases.ops import OPS
from vitkern.cases.record import Problem
from vitkern.check.examine import deterministic as deterministic_mode
from vitkern.check.examine import examine
from vitkern.check.plan import Request, plan
from vitkern.commands.choices import DTYPES
from vitkern.ops import backends

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SLEEP = 100_000_000  # cycles: what follows on another stream would run before this ends


def make(op: str, device: str = "cuda") -> Problem:
    known = OPS[op]
    return known.workload(known.cases[known.brief[0]], torch.float32, device)


def leaves_of(work: Problem) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in work.inputs.values())


def in_a_new_process(code: str) -> None:
    reason = backends.can_run("cuda", torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout.split()[-1:], done.stderr[-4000:])


@pytest.fixture(params=OPS)
def op(request) -> str:
    return request.param


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    reason = backends.can_run(request.param, torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("kind", ["oracle", "repeat"], ids=["free", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_match_the_oracle(op, backend, dtype, kind):
    """The kind "oracle" compares with the oracle, "repeat" compares repeated calls bit by bit."""
    request = Request([op], (), [f"{backend}-gpu"], [dtype], "cuda", quick=True, kinds=[kind])
    tasks = plan(request).tasks
    if not tasks:
        pytest.skip(str(backends.can_run(backend, torch.device("cuda"), DTYPES[dtype])))
    assert [outcome.failures for task in tasks if (outcome := examine(task)).failures] == []


def test_the_current_stream_is_used(op, backend):
    work = make(op)
    function, inputs = work.implementation(backend), tuple(work.inputs.values())
    expected = gradients(function, inputs)  # compiles, too
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        late = tuple(tensor.clone() for tensor in inputs)
        found = gradients(function, late)
    stream.synchronize()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(op, backend):
    work = make(op, "cuda:1")
    assert torch.cuda.current_device() == 0
    errors = errors_of(work.implementation(backend), work, exact_results(work))
    assert complaint(errors, torch.float32) is None
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_forward_and_backward_are_captured_in_a_graph(op, backend, deterministic):
    """A replay of the graph uses the values that the inputs have at that time."""
    work = make(op)
    function, leaves = work.implementation(backend), leaves_of(work)

    def step() -> list[torch.Tensor]:
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    with deterministic_mode(deterministic):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                before = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.9)
        graph.replay()
        expected = step()
    for ours, theirs, old in zip(captured, expected, before):
        assert not torch.equal(theirs, old)
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=1e-4 * scale, rtol=1e-4)


ON_ANOTHER_DEVICE = """
import torch
from tests.test_gpu import OPS, leaves_of, make

for op in OPS:
    work = make(op, "cuda:1")
    function, leaves = work.implementation("cuda"), leaves_of(work)
    before = torch._C._cuda_hasPrimaryContext(0)
    function(*leaves).sum().backward()
    assert torch._C._cuda_hasPrimaryContext(0) == before, op
    assert torch.cuda.current_device() == 0, op
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_process_on_another_device_gets_no_context_on_the_first():
    in_a_new_process(ON_ANOTHER_DEVICE)


FIRST_CALLS = """
import torch
from tests.test_gpu import OPS, leaves_of, make

for op in OPS:
    print(op, flush=True)
    work = make(op)
    function, leaves = work.implementation("cuda"), leaves_of(work)
    like = work.implementation("reference")(*leaves).detach()
    upstream = torch.ones_like(like)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        output = function(*leaves)
        found = torch.autograd.grad(output, leaves, upstream)
    graph.replay()
    expected = torch.autograd.grad(function(*leaves), leaves, upstream)
    torch.testing.assert_close(output, like, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found, expected):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=1e-4 * scale, rtol=1e-4)
"""


def test_a_graph_captures_the_first_call_of_a_process():
    """The CUDA runtime is initialised and the kernels are loaded during the capture."""
    in_a_new_process(FIRST_CALLS)


def test_each_replay_of_a_graph_draws_another_mask(backend):
    tensors = tuple(make("adapter_bottleneck").inputs.values())

    def step() -> torch.Tensor:
        return vitkern.adapter_bottleneck(*tensors, dropout_p=0.5, training=True, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    graph.replay()
    first = output.clone()
    graph.replay()
    assert not torch.equal(first, output)


def test_no_call_waits_for_the_device(op, backend):
    work = make(op)
    function, leaves = work.implementation(backend), leaves_of(work)
    function(*leaves).sum().backward()  # compiles, caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_clock_of_a_card_leaves_the_hosts_time_out():
    """A host that takes 20 ms for a kernel of microseconds."""
    clock, tensor = CudaClock(torch.device("cuda", 0)), torch.zeros(1, device="cuda")
    clock.milliseconds(lambda: (time.sleep(0.02), tensor.add_(1)), 3)
    assert clock.last.ahead and clock.last.device_ms < 10 < clock.last.host_ms
    assert 100 < clock.last.megahertz < 5000


def test_compiled_in_one_graph_it_is_the_same(op, backend):
    work = make(op)
    function = work.implementation(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    inputs = tuple(work.inputs.values())
    for ours, theirs in zip(gradients(compiled, inputs), gradients(function, inputs)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_levels_that_do_not_add_up_are_found_on_request(backend, monkeypatch):
    inputs = make_inputs(ATTENTION_CASES["hub-small"], device="cuda")
    monkeypatch.setenv("VITKERN_VALIDATE", "1")
    tables = inputs.spatial_shapes, inputs.level_start_index
    with pytest.raises(ValueError, match="spatial_shapes"):
        vitkern.ms_deform_attn(inputs.value[:, :-1], *tables, *inputs.differentiable()[1:], backend=backend)
