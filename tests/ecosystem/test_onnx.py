# SPDX-License-Identifier: Apache-2.0
"""vitkern.onnx: exported files are valid ONNX, have few nodes, and compute the same as the model."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import vitkern
from tests.ecosystem.onnx_files import (
    CHANNELS,
    HEADS,
    SIZES,
    UNEQUAL,
    Call,
    Layer,
    assert_same,
    attention_inputs,
    export,
    fused,
    onnx,
    pixels_of,
    plain,
    run,
    runtime,
)
from vitkern.nn import AdapterBottleneck, MSDeformAttn

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_layer_of_any_batch_and_queries(levels, tmp_path):
    layer, path = Layer(levels).eval(), tmp_path / "layer.onnx"
    batch, queries = Dim("batch"), Dim("queries")
    both = {0: batch, 1: queries}
    nodes = export(layer, layer.inputs(2, 5), path, (both, both, {0: batch}))
    assert nodes["GridSample"] == levels
    assert nodes.total() <= 45 + 4 * levels
    assert not nodes.keys() & {"ReduceProd", "Cast"}  # sizes are folded
    for sizes in ((2, 5), (1, 1), (3, 17)):
        assert_same(layer, path, layer.inputs(*sizes))


@pytest.mark.parametrize(
    "function, changes, options",
    [
        pytest.param(plain, {}, {}, id="plain"),
        pytest.param(plain, UNEQUAL, {"points_per_level": (4, 0, 2)}, id="plain-unequal"),
        pytest.param(plain, {}, {"method": "nearest"}, id="plain-nearest"),
        pytest.param(fused, dict(shared=("batch", "level")), {}, id="fused-shared-points"),
        pytest.param(fused, dict(numbers=4), {}, id="fused-boxes"),
        pytest.param(fused, dict(numbers=4, shared=("level",)), {}, id="fused-shared-boxes"),
        pytest.param(
            fused, UNEQUAL | {"numbers": 4}, {"points_per_level": (4, 0, 2)}, id="fused-unequal-boxes"
        ),
        pytest.param(
            fused, UNEQUAL, {"points_per_level": (4, 0, 2), "method": "nearest"}, id="fused-nearest"
        ),
    ],
)
def test_options_of_deformable_attention(function, changes, options, tmp_path):
    sizes = SIZES[: len(changes.get("points", (3, 3)))]
    model, path = Call(function, sizes=sizes, **options), tmp_path / "op.onnx"
    inputs = attention_inputs(function is fused, **changes)
    export(model, inputs, path, {"tensors": tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)})
    for batch, queries in ((2, 5), (3, 4)):
        assert_same(model, path, attention_inputs(function is fused, batch, queries, **changes))


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_locations_that_add_nothing(method, tmp_path):
    value, locations, weights = attention_inputs(False)
    strange = [
        float("nan"),
        float("inf"),
        -float("inf"),
        1e30,
        -1e30,
        3e38,
        -0.01,
        1.01,
        0.0,
        1.0,
        1e-30,
        1.5,
    ]
    locations.view(-1)[: len(strange)] = torch.tensor(strange)
    locations.view(-1)[20 : 20 + 2 * len(strange) : 2] = torch.tensor(strange)
    model, path = Call(plain, method=method), tmp_path / "op.onnx"
    export(model, (value, locations, weights), path)
    assert_same(model, path, (value, locations, weights))


def test_sizes_of_levels_that_come_when_the_model_runs(tmp_path):
    model, path = MSDeformAttn(HEADS * CHANNELS, 3, HEADS, 4).eval(), tmp_path / "layer.onnx"

    def inputs(sizes, starts):
        query, points = torch.randn(2, 5, HEADS * CHANNELS), torch.rand(2, 5, 3, 2)
        pixels = torch.randn(2, pixels_of(sizes), HEADS * CHANNELS)
        return query, points, pixels, torch.tensor(sizes), torch.tensor(starts)

    first = inputs(SIZES[:3], [0, 30, 36])
    nodes = export(model, first, path, (None, None, {1: Dim.DYNAMIC}, None, None))
    assert nodes["GridSample"] == 3
    assert_same(model, path, first)
    assert_same(model, path, inputs([(4, 4), (9, 2), (1, 3)], [0, 16, 34]))
    assert_same(model, path, inputs([(4, 4), (9, 2), (1, 3)], [3, 19, 0]))  # the last level first


@pytest.mark.parametrize("function", [plain, fused])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.float64, 1e-6)], ids=str)
def test_dtypes(function, dtype, tolerance, tmp_path):
    """Coordinates of float16 models stay float32, which GridSample has in every runtime."""
    inputs = attention_inputs(function is fused, dtype=dtype)
    if dtype == torch.float64:
        inputs = tuple(tensor.double() for tensor in inputs)
    model, path = Call(function), tmp_path / "op.onnx"
    export(model, inputs, path)
    try:
        assert_same(model, path, inputs, tolerance, tolerance)
    except runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        pytest.skip(f"onnxruntime cannot run it: {error}")


@pytest.mark.parametrize("opset, mode", [(16, "bilinear"), (18, "bilinear"), (20, "linear"), (23, "linear")])
def test_opsets(opset, mode, tmp_path):
    layer, path = Layer(2).eval(), tmp_path / "layer.onnx"
    export(
        layer,
        layer.inputs(2, 5),
        path,
        ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),
        opset_version=opset,
    )
    model = onnx.load(path)
    assert [domain.version for domain in model.opset_import if domain.domain == ""] == [opset]
    samplers = [node for node in model.graph.node if node.op_type == "GridSample"]
    modes = {a.s for node in samplers for a in node.attribute if a.name == "mode"}
    assert modes <= {mode.encode()}  # the default may be left out
    assert_same(layer, path, layer.inputs(3, 5))


def test_a_region_under_autocast(tmp_path):
    class Lowered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer(2)

        def forward(self, *inputs):
            with torch.autocast("cpu", dtype=torch.float16):
                return self.layer(*inputs).float()

    model, path = Lowered().eval(), tmp_path / "model.onnx"
    inputs = model.layer.inputs(2, 5)
    export(model, inputs, path)
    assert_same(model, path, inputs, 1e-2, 1e-2)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_adapter(activation, dtype, tmp_path):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up, self.scale = (
                nn.Linear(16, 4),
                nn.Linear(4, 16),
                nn.Parameter(torch.tensor([0.3])),
            )

        def forward(self, x, residual):
            weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
            same = vitkern.adapter_bottleneck(
                x, *weights, residual=x, scale=self.scale, activation=activation
            )
            return same + vitkern.adapter_bottleneck(
                x, *weights, residual=residual, scale=0.1, activation=activation
            )

    model, path = Adapter().to(dtype).eval(), tmp_path / "model.onnx"
    inputs = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    export(model, inputs, path, ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}))
    inputs = torch.randn(3, 5, 16, dtype=dtype), torch.randn(3, 5, 16, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert_same(model, path, inputs, tolerance, tolerance)


@pytest.mark.parametrize("images", [(), (2,)], ids=["one-weight", "weight-per-image"])
def test_tokens(images, tmp_path):
    def function(x, weight, query, key):
        return vitkern.token_project(x, query, key, vitkern.token_pool(x, weight))

    model, path = Call(function), tmp_path / "model.onnx"
    inputs = (
        torch.randn(2, 49, 16),
        torch.randn(*images, 4, 16) * 9,
        torch.randn(2, 49, 8),
        torch.randn(2, 4, 8),
    )
    nodes = export(model, inputs, path)
    assert nodes.keys() <= {"MatMul", "Transpose", "Softmax", "Add"}
    assert_same(model, path, inputs)


@pytest.mark.parametrize(
    "message, model, inputs, table",
    [
        (
            "adapter_bottleneck cannot be exported: training=True drops with dropout_p=0.5; call model.eval",
            AdapterBottleneck(16, 4, dropout=0.5),
            (torch.randn(2, 16),),
            {},
        ),
        ("there are no points", Call(plain), attention_inputs(False, points=(0, 0)), {}),
        (
            "TensorRT's plugin has no method='nearest'",
            Call(plain, method="nearest"),
            attention_inputs(False),
            {"ms_deform_attn": "tensorrt"},
        ),
        (
            r"TensorRT's plugin takes as many points on each level, got points_per_level=\[4, 0, 2\]",
            Call(plain, sizes=SIZES[:3], points_per_level=(4, 0, 2)),
            attention_inputs(False, **UNEQUAL),
            {"ms_deform_attn": "tensorrt"},
        ),
        (
            "TensorRT's plugin has no float64",
            Call(plain),
            tuple(tensor.double() for tensor in attention_inputs(False)),
            {"ms_deform_attn": "tensorrt"},
        ),
    ],
)
def test_what_cannot_be_exported_is_named(message, model, inputs, table, tmp_path):
    table = vitkern.onnx.translation_table(**table)
    with pytest.raises(ValueError, match=message):
        raise cause_of_failure(model, inputs, tmp_path / "no.onnx", table=table)


def cause_of_failure(*arguments, **options):
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        export(*arguments, **options)
    error = raised.value
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def test_channels_that_are_not_fixed_are_refused(tmp_path):
    dynamic = ({3: Dim("channels", min=2)}, None, None)
    with pytest.raises(ValueError, match=r"heads and channels must be fixed, got value of \[2, .*, None\]"):
        raise cause_of_failure(Call(plain), attention_inputs(False), tmp_path / "no.onnx", (dynamic,))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"ms_deform_attn must be one of .*, got 'trt'"):
        vitkern.onnx.translation_table(ms_deform_attn="trt")
    with pytest.raises(ValueError, match=r"ms_deform_attn must be one of .*, got 'trt'"):
        vitkern.onnx.register_legacy(ms_deform_attn="trt")


def as_if_trained(model):
    """Changes every parameter, so that no branch is multiplied by zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.dim() > 1 else 0.1))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, most_nodes",
    [
        ("vit_adapter_tiny", 64, 1100),
        ("adaptformer_vit_base", 224, 600),
        ("vt_resnet18", 64, 100),
        ("vitae_tiny", 224, 500),
        ("vitaev2_s", 224, 1100),
    ],
)
def test_whole_models(name, size, most_nodes, tmp_path):
    """Models built from a checkpoint, exported for any batch size."""
    torch.save(
        as_if_trained(vitkern.create_model(name, img_size=size)).state_dict(), tmp_path / "weights.pth"
    )
    model = vitkern.create_model(name, img_size=size).eval()
    model.load_state_dict(torch.load(tmp_path / "weights.pth"))
    nodes = export(model, (torch.randn(2, 3, size, size),), tmp_path / "model.onnx", ({0: Dim("batch")},))
    assert nodes.total() <= most_nodes
    for batch in (2, 1, 3):
        image = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected = model(image)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        for actual, tensor in zip(run(tmp_path / "model.onnx", (image,)), expected, strict=True):
            torch.testing.assert_close(actual, tensor, rtol=0, atol=1e-4 * tensor.abs().max().item())
