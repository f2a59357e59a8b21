# SPDX-License-Identifier: Apache-2.0
"""vitkern.onnx: TensorRT's plugin, and the exporter that goes through TorchScript."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import vitkern
from tests.ecosystem.onnx_files import (
    SIZES,
    UNEQUAL,
    Call,
    Layer,
    assert_same,
    attention_inputs,
    checked,
    export,
    onnx,
    plain,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_is_tensorrts(path, version):
    """Checks the node's inputs as configurePlugin does in TensorRT's plugin/multiscaleDeformableAttnPlugin."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    (node,) = [node for node in model.graph.node if node.op_type == "MultiscaleDeformableAttnPlugin_TRT"]
    assert node.domain == "trt.plugins" and "trt.plugins" in {o.domain for o in model.opset_import}
    assert {a.name: a.s.decode() for a in node.attribute} == {
        "plugin_version": version,
        "plugin_namespace": "",
    }
    known = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.input)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    for name, dtype, rank in zip(node.input, (1, 6, 6, 1, 1), (4, 2, 1, 6, 5), strict=True):
        if name in constants:
            assert constants[name].data_type == dtype and len(constants[name].dims) == rank
        else:
            assert known[name].elem_type == dtype
            assert not known[name].HasField("shape") or len(known[name].shape.dim) == rank
    assert len(node.output) == 1
    assert not {"GridSample"} & {n.op_type for n in model.graph.node}


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tensorrt_plugin(version, dtype, tmp_path):
    layer, path = Layer(2).eval().to(dtype), tmp_path / "layer.onnx"
    inputs = tuple(tensor.to(dtype) for tensor in layer.inputs(2, 5))
    table = vitkern.onnx.translation_table(ms_deform_attn="tensorrt", plugin_version=version)
    export(layer, inputs, path, tuple({0: Dim.DYNAMIC} for _ in inputs), table)
    assert_is_tensorrts(path, version)


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize("levels", [1, 3])
def test_legacy_exporter(opset, levels, tmp_path):
    vitkern.onnx.register_legacy()
    layer, path = Layer(levels).eval(), tmp_path / "layer.onnx"
    axes = {"query": {0: "batch", 1: "queries"}, "points": {0: "batch", 1: "queries"}, "pixels": {0: "batch"}}
    torch.onnx.export(
        layer,
        layer.inputs(2, 5),
        path,
        dynamo=False,
        opset_version=opset,
        input_names=list(axes),
        dynamic_axes=axes,
    )
    assert checked(path)["GridSample"] == levels
    for sizes in ((2, 5), (1, 1), (3, 17)):
        assert_same(layer, path, layer.inputs(*sizes))


def test_legacy_exporter_of_everything_else(tmp_path):
    vitkern.onnx.register_legacy()
    down, up = nn.Linear(16, 4).requires_grad_(False), nn.Linear(4, 16).requires_grad_(False)

    def function(x, weight, query, key, value, locations, weights):
        x = vitkern.adapter_bottleneck(x, down.weight, None, up.weight, up.bias, residual=x, scale=0.5)
        x = vitkern.token_project(x, query, key, vitkern.token_pool(x, weight))
        sampled = plain(
            value, locations, weights, sizes=SIZES[:3], points_per_level=(4, 0, 2), method="nearest"
        )
        return x, sampled

    model, path = Call(function).eval(), tmp_path / "model.onnx"
    inputs = torch.randn(2, 49, 16), torch.randn(4, 16), torch.randn(2, 49, 8), torch.randn(2, 4, 8)
    inputs += attention_inputs(False, **UNEQUAL)
    torch.onnx.export(model, inputs, path, dynamo=False, opset_version=17)
    checked(path)
    assert_same(model, path, inputs)


def test_legacy_exporter_with_tensorrts_plugin(tmp_path):
    vitkern.onnx.register_legacy(ms_deform_attn="tensorrt", plugin_version="2")
    layer, path = Layer(2).eval(), tmp_path / "layer.onnx"
    torch.onnx.export(
        layer, layer.inputs(2, 5), path, dynamo=False, opset_version=17, custom_opsets={"trt.plugins": 1}
    )
    checked(path)
    assert_is_tensorrts(path, "2")
