# SPDX-License-Identifier: Apache-2.0
"""NVIDIA TAO's ops from vitkern.install("tao"); TAO's package is a stand-in here, from its interface."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.library import Library

import vitkern
from tests.test_compat_deformable_detr import formula, leaves, make
from tests.test_install import places

FOLDER = "nvidia_tao_pytorch/cv/deformable_detr/model/ops"
NAME = FOLDER.replace("/", ".")
FUNCTIONS = """
import os
import torch
from torch.autograd.function import once_differentiable

def load_ops(ops_dir, lib_name):
    torch.ops.load_library(os.path.join(ops_dir, lib_name))

class MSDeformAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return torch.ops.nvidia.MultiscaleDeformableAttnPlugin_TRT(value, shapes, starts, locations, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        value, locations, weights = torch.ops.nvidia.DMHA_backward(*ctx.saved_tensors, gradient, ctx.im2col_step)
        return value, None, None, locations, weights, None
"""
# The layer loads the library when it is built. It calls the op on any device here.
MODULES = f"""
import os, sys
from torch import nn
from {NAME}.functions import MSDeformAttnFunction, load_ops

class MSDeformAttn(nn.Module):
    def __init__(self):
        super().__init__()
        version = f"{{sys.version_info.major}}{{sys.version_info.minor}}"
        load_ops(os.path.dirname(__file__), f"MultiScaleDeformableAttention.cpython-{{version}}-x86_64-linux-gnu.so")

    def forward(self, *inputs):
        return MSDeformAttnFunction.apply(*inputs, 64)
"""


def build(folder):
    """Writes the package and returns the folder of its ops."""
    place = folder / FOLDER
    place.mkdir(parents=True)
    for each in (place, *place.parents[:4]):
        (each / "__init__.py").touch()
    (place / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    (place / "modules.py").write_text(MODULES, encoding="utf-8")
    return place


@pytest.fixture
def package(tmp_path, monkeypatch):
    place = build(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield place
    vitkern.uninstall()
    for name in [name for name in sys.modules if name.startswith("nvidia_tao_pytorch")]:
        del sys.modules[name]


def load(name="modules"):
    return importlib.import_module(f"{NAME}.{name}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def ops():
    return [
        name
        for name in ("MultiscaleDeformableAttnPlugin_TRT", "DMHA_backward")
        if hasattr(torch.ops.nvidia, name)
    ]


@pytest.mark.parametrize("early", [False, True], ids=["before the import", "after it"])
def test_a_layer_is_built_and_trains(package, early, device):
    if early:
        with pytest.raises(OSError, match="MultiScaleDeformableAttention"):
            load().MSDeformAttn()
    assert places(vitkern.install("tao")) == places(vitkern.install("tao"))
    layer = load().MSDeformAttn()
    ours, theirs = leaves(make(65)), leaves(make(65))
    output = layer(*(each.to(device) for each in ours)).cpu()
    expected = formula(theirs)
    assert output.shape == (65, 5, 2, 8)
    torch.testing.assert_close(output.flatten(2), expected)
    seed = torch.randn_like(expected)
    output.flatten(2).backward(seed)
    expected.backward(seed)
    for at in (0, 3, 4):
        torch.testing.assert_close(ours[at].grad, theirs[at].grad)


def test_gradients_of_the_op_alone(package):
    vitkern.install("tao")
    given = leaves(make(dtype=torch.float64, channels=3))
    functions = torch.ops.nvidia.MultiscaleDeformableAttnPlugin_TRT, lambda *x: load().MSDeformAttn()(*x)
    for function in functions:
        assert torch.autograd.gradcheck(function, given, fast_mode=True)


def test_traced_it_is_a_node_for_exporters(package):
    """TAO's exporter gives this name a symbol of its own."""
    vitkern.install("tao")
    traced = torch.jit.trace(torch.ops.nvidia.MultiscaleDeformableAttnPlugin_TRT, make())
    assert [node.kind() for node in traced.graph.nodes()] == ["nvidia::MultiscaleDeformableAttnPlugin_TRT"]


def test_it_compiles_and_has_a_fake(package):
    vitkern.install("tao")
    layer = load().MSDeformAttn()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*make()), layer(*make()))
    assert layer(*(each.to("meta") for each in make())).shape == (2, 5, 2, 8)
    torch._dynamo.reset()


def test_back_again(package):
    original = load("functions").load_ops
    load()
    vitkern.install("tao")
    assert load().load_ops is load("functions").load_ops is not original and len(ops()) == 2
    assert places(vitkern.uninstall("tao"))[0] == "torch.ops.nvidia.MultiscaleDeformableAttnPlugin_TRT"
    assert load().load_ops is load("functions").load_ops is original and not ops()
    assert not vitkern.uninstall("tao") and not vitkern.uninstall()
    vitkern.install("tao")
    assert len(ops()) == 2 and vitkern.uninstall() and not ops()


def test_ops_of_a_loaded_library_stay(package):
    library = Library("nvidia", "FRAGMENT")
    library.define("DMHA_backward(Tensor value) -> Tensor")
    try:
        for override in (False, True):
            with pytest.raises(
                RuntimeError, match="torch.ops.nvidia.DMHA_backward is there already, from a library"
            ):
                vitkern.install("tao", override=override)
        assert ops() == ["DMHA_backward"] and not vitkern.uninstall("tao")
        assert not hasattr(load("functions").load_ops, "replaces")
    finally:
        library._destroy()


def test_an_installed_library_is_not_shadowed_unasked(package):
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    file = package / f"MultiScaleDeformableAttention.cpython-{version}-x86_64-linux-gnu.so"
    file.write_text("no library", encoding="utf-8")
    with pytest.raises(
        RuntimeError, match="is installed, as .*MultiScaleDeformableAttention.cpython.*override=True"
    ):
        vitkern.install("tao")
    assert not ops() and NAME not in sys.modules
    vitkern.install("tao", override=True)
    load().MSDeformAttn()
    with pytest.raises(OSError, match="another.so"):
        load("functions").load_ops(str(package), "another.so")


def test_a_version_without_the_loader_says_so(package):
    (package / "functions.py").write_text("", encoding="utf-8")
    vitkern.install("tao")
    with pytest.raises(
        ImportError, match=r"the function load_ops in .*functions, which has none in this version"
    ):
        load("functions")


def test_vitkern_run(tmp_path):
    build(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(f"from {NAME}.modules import MSDeformAttn; print(MSDeformAttn())", encoding="utf-8")
    command = [sys.executable, "-m", "vitkern", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout == "MSDeformAttn()\n", done.stderr
