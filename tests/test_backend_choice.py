# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call: asked for, told by the environment, or refused with the reason; and what it is asked."""

import os
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
        ("80-real 90-real 100-real 120", (8, 0), True),
        ("80-real 90-real 100-real 120", (8, 9), True),
        ("80-real 90-real 100-real 120", (7, 5), False),
        ("80-real 90-real 100-real 120", (12, 1), True),
        ("80-real 90-real", (10, 0), False),
        ("80", (10, 0), True),
        ("90-virtual", (10, 0), True),
        ("90-virtual", (8, 0), False),
    ],
)
def test_which_cards_a_build_serves(architectures, capability, fits):
    assert (backends._no_image_for(capability, architectures) is None) == fits


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
