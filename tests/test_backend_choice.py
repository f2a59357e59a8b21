# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call: asked for, told by the environment, or refused with the reason; and what it is asked."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.test_torch_citizenship import attend, make
from vitkern import _C, backends
from vitkern.ops import direct
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
    """A card that is not there, for a build of its architectures with nvcc 13.1, whose driver is still to be told."""

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
    """Else the kernels would be chosen and fail at every call. The choice is made anew, whatever was chosen before."""
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
    """Torch below 2.10 is asked attribute by attribute, and one without its C functions for storages."""
    asking = _C.Describer(direct._tell, direct._room, torch.Tensor, torch.nn.Parameter)
    assert direct.room is not direct._room, "torch has lost the functions that make this quick"
    tensor = torch.randn(2, 3, 4)
    plain = (tensor, tensor.double(), tensor[:1], tensor.transpose(0, 1), tensor[0], None, tensor.long())
    kinds = {"parameter": torch.nn.Parameter(tensor), "expanded": tensor[:1].expand(2, 3, 4)}
    for one in (*plain, *kinds.values()):
        assert direct.describe((one, tensor)) == asking((one, tensor)) is not None
    lazy = (torch._neg_view(tensor), torch._efficientzerotensor((2,)), tensor.to_sparse(), tensor.to("meta"))
    for one in lazy:
        assert direct.describe((tensor, one)) is asking((tensor, one)) is None
    monkeypatch.setattr(direct, "lends", direct._tell)
    forget_plans()
    inputs = make().requires_grad_()
    attend(*inputs).sum().backward()
    assert inputs.value.grad is not None


def test_plans_may_be_forgotten_at_any_time(monkeypatch):
    inputs, plan = make(), ops.ms_deform_attn._planned

    def planned(arguments):
        found = plan(arguments)
        forget_plans()  # as another thread may
        return found

    monkeypatch.setattr(ops.ms_deform_attn, "_planned", planned)
    forget_plans()
    assert attend(*inputs).shape == (2, 5, 16)
