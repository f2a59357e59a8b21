# SPDX-License-Identifier: Apache-2.0
"""Models as files: TorchScript traces, exported programs and AOTInductor packages, loaded in a fresh process."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.export import Dim

import vitkern
from vitkern.nn import AdapterBottleneck, MSDeformAttn

pytestmark = pytest.mark.filterwarnings("ignore")


class Layer(nn.Module):
    """Deformable attention on two levels, then an adapter: two ops with different options."""

    def __init__(self):
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 2, 3)
        self.adapter = AdapterBottleneck(16, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, query, reference_points, pixels):
        return self.adapter(self.attention(query, reference_points, pixels, [(6, 5), (3, 2)]))


def inputs(batch, queries):
    return torch.randn(batch, queries, 16), torch.rand(batch, queries, 2, 2), torch.randn(batch, 36, 16)


SIZES = [(2, 5), (3, 7), (1, 1)]


@pytest.fixture
def layer():
    layer = Layer().eval()
    layer(*inputs(2, 5))  # from now on a call that nothing watches takes the fast path, past the dispatcher
    return layer


def exported(layer):
    batch, queries = Dim("batch"), Dim("queries")
    both = {0: batch, 1: queries}
    with torch.no_grad():
        return torch.export.export(layer, inputs(2, 5), dynamic_shapes=(both, both, {0: batch}))


def assert_runs_in_a_fresh_process(layer, path, load, imports="import vitkern"):
    examples = [(arguments, layer(*arguments).detach()) for arguments in (inputs(*sizes) for sizes in SIZES)]
    torch.save(examples, path.with_suffix(".examples"))
    program = f"""
        import torch
        {imports}
        model = {load}
        for arguments, expected in torch.load({str(path.with_suffix(".examples"))!r}):
            torch.testing.assert_close(model(*arguments), expected, rtol=1e-5, atol=1e-5)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_trace_has_the_ops_and_takes_other_sizes(layer):
    trace = torch.jit.trace(layer, inputs(2, 5))
    graph = str(trace.inlined_graph)
    assert "vitkern::ms_deform_attn_fused" in graph and "vitkern::adapter_bottleneck" in graph
    for sizes in SIZES:
        arguments = inputs(*sizes)
        assert torch.equal(trace(*arguments), layer(*arguments))


def test_a_trace_trains(layer):
    trace = torch.jit.trace(layer, inputs(2, 5))
    arguments = inputs(3, 4)
    expected = torch.autograd.grad(layer(*arguments).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(
        torch.autograd.grad(trace(*arguments).square().sum(), list(trace.parameters())), expected
    )


def test_a_trace_is_loaded_where_vitkern_is_imported(layer, tmp_path):
    path = tmp_path / "trace.pt"
    torch.jit.trace(layer, inputs(2, 5)).save(path)
    load = f"torch.jit.freeze(torch.jit.load({str(path)!r}).eval())"
    result = assert_runs_in_a_fresh_process(layer, path, load)
    assert result.returncode == 0, result.stderr
    result = assert_runs_in_a_fresh_process(layer, path, load, imports="")
    assert "Unknown builtin op: vitkern::ms_deform_attn_fused" in result.stderr


def test_an_exported_program_is_loaded_where_vitkern_is_imported(layer, tmp_path):
    path = tmp_path / "program.pt2"
    torch.export.save(exported(layer), path)
    result = assert_runs_in_a_fresh_process(layer, path, f"torch.export.load({str(path)!r}).module()")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_an_aotinductor_package_is_loaded_where_vitkern_is_imported(layer, tmp_path):
    path = tmp_path / "package.pt2"
    torch._inductor.aoti_compile_and_package(exported(layer), package_path=str(path))
    load = f"torch._inductor.aoti_load_package({str(path)!r})"
    result = assert_runs_in_a_fresh_process(layer, path, load)
    assert result.returncode == 0, result.stderr
    result = assert_runs_in_a_fresh_process(layer, path, load, imports="")
    assert "vitkern::ms_deform_attn_fused" in result.stderr


@pytest.mark.slow
def test_a_trace_of_a_whole_model(tmp_path):
    model = vitkern.create_model("vit_adapter_tiny", img_size=64).eval()
    with torch.no_grad():
        trace = torch.jit.trace(model, torch.randn(2, 3, 64, 64))
        assert str(trace.inlined_graph).count("vitkern::ms_deform_attn_fused") == 10
        trace.save(tmp_path / "model.pt")
        image = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(
            tuple(torch.jit.load(tmp_path / "model.pt")(image)), tuple(model(image)), rtol=1e-5, atol=1e-5
        )
