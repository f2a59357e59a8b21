# SPDX-License-Identifier: Apache-2.0
"""What only a real card can show: streams, a second device, graphs, images. Correctness itself is in the other files,
whose tests run on the card too (`-m gpu`)."""

import pytest
import torch

import vitkern
from tests.helpers import gradients
from vitkern import backends
from vitkern.cases import ATTENTION_CASES, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BACKENDS = ["cuda", "triton"]
CASE = ATTENTION_CASES["injector-B512"].with_batch(1)


def attend(inputs, backend):
    return lambda *tensors: vitkern.ms_deform_attn(
        tensors[0], inputs.spatial_shapes, inputs.level_start_index, *tensors[1:], backend=backend
    )


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = backends.can_run(request.param, torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def test_the_current_stream_is_used(backend):
    inputs = make_inputs(CASE, device="cuda")
    expected = attend(inputs, backend)(*inputs.differentiable())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what follows on another stream would run before this ends
        late = inputs.value * 2
        output = attend(inputs, backend)(late, *inputs.differentiable()[1:])
    stream.synchronize()
    torch.testing.assert_close(output, expected * 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(backend):
    on_cpu = make_inputs(CASE)
    expected = gradients(attend(on_cpu, "cpu"), on_cpu.differentiable())
    inputs = make_inputs(CASE, device="cuda:1")
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(gradients(attend(inputs, backend), inputs.differentiable()), expected):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-3, rtol=1e-3)
    assert torch.cuda.current_device() == 0


def test_forward_and_backward_are_captured_in_a_graph(backend):
    inputs = make_inputs(CASE, device="cuda").requires_grad_()
    tensors = inputs.differentiable()

    def step():
        return torch.autograd.grad(attend(inputs, backend)(*tensors).square().sum(), tensors)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs.value.mul_(1.0)
    graph.replay()
    for ours, theirs in zip(captured, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_no_call_waits_for_the_device(backend):
    inputs = make_inputs(CASE, device="cuda").requires_grad_()
    attend(inputs, backend)(*inputs.differentiable())  # compiles, caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(inputs, backend)(*inputs.differentiable()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_levels_that_do_not_add_up_are_found_on_request(backend, monkeypatch):
    inputs = make_inputs(CASE, device="cuda")
    inputs.value = inputs.value[:, :-1]
    monkeypatch.setenv("VITKERN_VALIDATE", "1")
    with pytest.raises(ValueError, match="spatial_shapes"):
        attend(inputs, backend)(*inputs.differentiable())
