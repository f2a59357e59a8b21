# SPDX-License-Identifier: Apache-2.0
"""Patched models: copied, pickled, compiled, cast, wrapped, and examined by `vitkern doctor --model`."""

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vitkern
from tests.test_patching import SHAPES, STARTS, Model, batch, gradients, is_patched
from vitkern import cli


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched(copied):
    model, inputs = Model(), batch()
    vitkern.patch(model)
    twin = copied(model)
    assert is_patched(twin) == [True, True] and torch.equal(twin(*inputs), model(*inputs))
    assert twin.layers[0].value_proj.weight is not model.layers[0].value_proj.weight
    vitkern.unpatch(twin)
    assert is_patched(model) == [True, True] and is_patched(twin) == [False, False]


def test_torch_save_of_a_whole_model():
    model, inputs, file = Model(), batch(), io.BytesIO()
    vitkern.patch(model)
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*inputs), model(*inputs))


@pytest.mark.parametrize("patch_first", [True, False])
def test_compile(patch_first):
    model, inputs = Model(), batch()
    expected = model(*inputs)
    compiled = torch.compile(model, backend="aot_eager")
    if not patch_first:
        compiled(*inputs)
    assert vitkern.patch(compiled).rows[0].place == "_orig_mod.layers.*"
    torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=1e-4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(*inputs)
    assert any("ms_deform_attn_fused" in event.name for event in profile.events())


def test_compile_without_graph_breaks():
    model, inputs = Model(), batch()
    vitkern.patch(model)
    graph = torch.compile(model.layers[0], backend="aot_eager", fullgraph=True)
    query, pixels, points = inputs
    torch.testing.assert_close(
        graph(query, points, pixels, SHAPES, STARTS), model.layers[0](query, points, pixels, SHAPES, STARTS)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = Model()
    expected = model(*batch())
    vitkern.patch(model)
    output = model.to(dtype)(*batch(dtype=dtype))
    tolerance = 1e-4 if dtype == torch.float64 else 3e-2
    assert output.dtype == dtype and (output - expected).abs().max() <= tolerance * expected.abs().max()


def test_autocast():
    model = Model()
    expected = model(*batch())
    vitkern.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*batch())
    assert (output - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = Model()
    assert vitkern.patch(model)
    inputs = [tensor.to("meta") for tensor in batch()]
    query, pixels, points = inputs
    assert model.layers[0](query, points, pixels, SHAPES.to("meta"), STARTS.to("meta")).shape == (2, 7, 32)


@pytest.mark.parametrize("patch_first", [True, False])
def test_distributed(patch_first, tmp_path):
    model, inputs = Model(), batch()
    expected = gradients(model, inputs)[1][3:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        if patch_first:
            vitkern.patch(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert patch_first or vitkern.patch(wrapped).rows[0].place == "module.layers.*"
        wrapped(*inputs).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(model.parameters(), expected):
        assert (parameter.grad - gradient).abs().max() <= 1e-3 * gradient.abs().max()


def test_a_model_with_a_scripted_part():
    model = Model()
    model.head = torch.jit.script(model.head)
    assert vitkern.patch(model) and model(*batch()).shape == (2, 7, 3)
    traced = torch.jit.trace(Model(), batch())
    assert str(vitkern.patch(traced)) == "nothing was replaced"


def test_a_wrapper_that_lends_the_parts_of_a_layer():
    model = Model()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    table = vitkern.patch(model)
    assert not table.left and {path for row in table for path in row.paths} == {
        "layers.0._orig_mod",
        "layers.1",
    }


def test_doctor_names_the_layers_of_a_model(capsys):
    assert cli.main(["doctor", "--model", "tests.test_patching:Model"]) == 0
    *table, summary = capsys.readouterr().out.splitlines()
    assert " ".join(table).split() == (
        ["where", "was", "is", "now", "places", "layers.*", "MSDeformAttn", "ms_deform_attn_fused", "2"]
    )
    assert summary == "by trial: 2 fused, 0 where it samples, 0 left"
    assert cli.main(["doctor", "--model", f"{Path(__file__).parent}/test_patching.py:Model", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["replaced"]
    assert row["paths"] == ["layers.0", "layers.1"] and row["fused"] is True


@pytest.mark.parametrize(
    "name, message",
    [
        ("nonsense", "--model takes package.module:name or file.py:name, where name is a model"),
        ("tests.test_patching:Nothing", "tests.test_patching has no 'Nothing'"),
        ("tests.test_patching:batch", "makes a tuple, not a torch.nn.Module"),
        ("no_such_package:model", "No module named 'no_such_package'"),
        ("no_such_file.py:model", "no_such_file.py cannot be imported: "),
    ],
)
def test_doctor_says_what_is_wrong_with_a_name(name, message, capsys):
    assert cli.main(["doctor", "--model", name]) == 2
    assert message in capsys.readouterr().err


def test_a_pickle_where_vitkern_is_not_installed(tmp_path):
    model = Model()
    vitkern.patch(model)
    file = tmp_path / "model.pt"
    torch.save(model, file)
    script = f"""
import sys
sys.modules["vitkern"] = None
import torch
try:
    torch.load({str(file)!r}, weights_only=False)
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "vitkern" in result.stdout
    vitkern.unpatch(model)
    torch.save(model, file)
    assert b"vitkern" not in file.read_bytes()
