# SPDX-License-Identifier: Apache-2.0
"""The op as a citizen of torch: dispatcher, compiler, exporter, autocast, checkpointing, transforms, second order."""

import contextlib
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vitkern
from vitkern import _C, backends
from vitkern.cases import MsDeformAttnCase, make_inputs
from vitkern.nn import MSDeformAttn
from vitkern.ops import direct
from vitkern.ops.op import forget_plans

CASE = MsDeformAttnCase("small", "", 2, ((6, 5), (3, 2)), 5, 2, 8, 3)
OP = torch.ops.vitkern.ms_deform_attn
BACKWARD = torch.ops.vitkern.ms_deform_attn_backward


def make(dtype=torch.float64, **changes):
    return make_inputs(MsDeformAttnCase(**{**vars(CASE), **changes}), locations="uniform", dtype=dtype)


def attend(value, shapes, starts, locations, weights, **options):
    return vitkern.ms_deform_attn(value, shapes, starts, locations, weights, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [(), ([4, 2],), ([3, 3], "nearest")], ids=str)
def test_opcheck(dtype, options):
    inputs = make(dtype)
    if options:
        inputs.sampling_locations = inputs.sampling_locations.flatten(3, 4)
        inputs.attention_weights = inputs.attention_weights.flatten(3)
    torch.library.opcheck(OP.default, (*inputs.requires_grad_(), *options))


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False)])
def test_opcheck_of_the_backward(needed):
    inputs = make()
    torch.library.opcheck(BACKWARD.default, (torch.randn(2, 5, 16, dtype=torch.float64), needed, *inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def function(*args):
        return attend(*args).sin() * 2

    inputs = make(torch.float32).requires_grad_()
    outputs = torch.compile(function, fullgraph=True, dynamic=dynamic)(*inputs), function(*inputs)
    results = [(out, *torch.autograd.grad(out.sum(), inputs.differentiable())) for out in outputs]
    for compiled, eager in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_compiles_with_sizes_as_numbers_and_a_second_shape():
    compiled = torch.compile(lambda v, loc, w, levels: attend(v, levels, None, loc, w), fullgraph=True)
    for levels in (((6, 5), (3, 2)), ((4, 4), (2, 2))):
        inputs = make(levels=levels)
        args = inputs.value, inputs.sampling_locations, inputs.attention_weights
        torch.testing.assert_close(compiled(*args, levels), attend(*inputs))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 2, 3)

    def forward(self, query, reference_points, pixels, shapes, starts):
        return self.attention(query, reference_points, pixels, shapes, starts)


def layer_inputs(batch=2, queries=5):
    shapes, starts = torch.tensor([[6, 5], [3, 2]]), torch.tensor([0, 30])
    return (
        torch.randn(batch, queries, 16),
        torch.rand(1, queries, 1, 2),
        torch.randn(batch, 36, 16),
        shapes,
        starts,
    )


def test_exports_with_a_dynamic_batch_and_the_exported_program_trains():
    layer, arguments = Layer(), layer_inputs()
    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = ({0: batch}, None, {0: batch}, None, None)
    exported = torch.export.export(layer, arguments, dynamic_shapes=dynamic).module()
    arguments = layer_inputs(batch=3)
    torch.testing.assert_close(exported(*arguments), layer(*arguments))

    layer(*arguments).square().sum().backward()
    exported(*arguments).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    trained = dict(exported.named_parameters())
    assert trained.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(trained[name].grad, gradient, msg=name)


def test_a_second_derivative_is_never_silently_wrong():
    """With once_differentiable, as the peers use it, the second-order term of this loss vanishes without a word."""
    inputs = make().requires_grad_()
    (gradient,) = torch.autograd.grad(attend(*inputs).square().sum(), inputs.value, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        ((gradient * gradient).sum() + inputs.value.sum()).backward()


def test_the_reference_has_the_second_derivative():
    inputs = make().requires_grad_()

    def loss(value):
        output = attend(value, *list(inputs)[1:], backend="reference").square().sum()
        (gradient,) = torch.autograd.grad(output, value, create_graph=True)
        return (gradient * gradient).sum() + value.sum()

    assert torch.autograd.gradcheck(loss, (inputs.value,), fast_mode=True)


TRANSFORMS = {
    "jvp": lambda function, value: torch.func.jvp(function, (value,), (value,)),
    "grad": lambda function, value: torch.func.grad(function)(value),
    "jacrev": lambda function, value: torch.func.jacrev(function)(value),
    "hessian": lambda function, value: torch.func.hessian(function)(value),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_without_a_kernel_say_so(transform):
    inputs = make()

    def function(value):
        return attend(value, *list(inputs)[1:]).sum()

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        TRANSFORMS[transform](function, inputs.value)


def test_the_reference_runs_under_every_transform():
    inputs = make()

    def function(value):
        return attend(value, *list(inputs)[1:], backend="reference").sum()

    gradient = torch.func.grad(function)(inputs.value)
    _, tangent = torch.func.jvp(function, (inputs.value,), (torch.ones_like(inputs.value),))
    torch.testing.assert_close(gradient.sum(), tangent)


def test_vmap():
    inputs = make()
    locations = torch.rand(3, *inputs.sampling_locations.shape, dtype=torch.float64)

    def function(where):
        return attend(
            inputs.value, inputs.spatial_shapes, inputs.level_start_index, where, inputs.attention_weights
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch loops over the batch and says so
        torch.testing.assert_close(
            torch.vmap(function)(locations), torch.stack([function(w) for w in locations])
        )


def test_batches_of_gradients():
    inputs = make().requires_grad_()
    output = attend(*inputs)
    grad_outputs = torch.randn(3, *output.shape, dtype=torch.float64)
    leaves = inputs.differentiable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched = torch.autograd.grad(output, leaves, grad_outputs, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, leaves, g, retain_graph=True) for g in grad_outputs]
    for ours, expected in zip(batched, zip(*one_by_one)):
        torch.testing.assert_close(ours, torch.stack(expected))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_lazily_negated_tensors(requires_grad):
    inputs = make()
    expected = attend(*inputs)
    for name in ("value", "sampling_locations", "attention_weights"):
        negated = torch._neg_view(-getattr(inputs, name)).requires_grad_(requires_grad)
        assert torch.equal(vitkern.ms_deform_attn(**{**vars(inputs), name: negated}), expected), name
    leaves = inputs.requires_grad_().differentiable()
    output, grad_output = attend(*inputs), torch.randn_like(expected)
    plain = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    negated = torch.autograd.grad(output, leaves, torch._neg_view(-grad_output))
    assert all(torch.equal(a, b) for a, b in zip(negated, plain))


def test_lazy_zeros():
    inputs = make()
    inputs.attention_weights = torch._efficientzerotensor(inputs.attention_weights.shape, dtype=torch.float64)
    assert torch.equal(attend(*inputs), torch.zeros(2, 5, 16, dtype=torch.float64))


TRACES = {
    "grad": lambda function, value: torch.func.grad(lambda v: function(v).sum())(value),
    "functionalize": lambda function, value: torch.func.functionalize(function)(value),
    "jit.trace": lambda function, value: torch.jit.trace(function, value),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.filterwarnings("ignore")
def test_tracing_with_sizes_as_numbers_leaves_nothing_behind(trace, backend):
    # Sizes that no other test has: level tables are kept from call to call.
    sizes = [(11, 3 + list(TRACES).index(trace)), (1, 2 if backend == "cpu" else 3)]
    inputs = make(torch.float32, levels=tuple(sizes))

    def function(value, sizes=sizes, backend=backend):
        return attend(
            value, sizes, None, inputs.sampling_locations, inputs.attention_weights, backend=backend
        )

    with contextlib.suppress(
        NotImplementedError, RuntimeError
    ):  # what cannot be traced must do no harm either
        TRACES[trace](function, inputs.value)
    assert torch.equal(function(inputs.value, backend="cpu"), attend(*inputs))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    sizes = [(13, 2), (1, 2)]
    inputs = make(torch.float32, levels=tuple(sizes))

    def function(value, locations, weights):
        return attend(value, sizes, None, locations, weights)

    arguments = inputs.differentiable()
    assert torch.equal(torch.jit.trace(function, arguments)(*arguments), function(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_value_and_keeps_locations(dtype):
    inputs = make(torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = attend(*inputs)
    assert output.dtype == dtype
    by_hand = attend(inputs.value.to(dtype), *list(inputs)[1:])
    assert torch.equal(output, by_hand)
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.differentiable())
    with torch.autocast("cpu", dtype=dtype):
        assert attend(*make(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    inputs = make(torch.float32).requires_grad_()
    expected = torch.autograd.grad(attend(*inputs).sum(), inputs.differentiable())
    checkpoint(attend, *inputs, use_reentrant=reentrant).sum().backward()
    for tensor, gradient in zip(inputs.differentiable(), expected):
        assert torch.equal(tensor.grad, gradient)


def test_inference_mode_and_then_training():
    inputs = make(torch.float32)
    sizes = [(6, 5), (3, 2)]
    args = inputs.sampling_locations, inputs.attention_weights
    with torch.inference_mode():
        attend(inputs.value, sizes, None, *args)
    value = inputs.value.clone().requires_grad_()
    attend(value, sizes, None, *args).sum().backward()
    assert value.grad is not None


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = [(7, 5), (3, 2)]
    with FakeTensorMode():
        value, where, weights = (
            torch.empty(1, 41, 2, 4),
            torch.empty(1, 3, 2, 2, 2, 2),
            torch.empty(1, 3, 2, 2, 2),
        )
        assert attend(value, sizes, None, where, weights).shape == (1, 3, 8)
    value, where, weights = torch.ones(1, 41, 2, 4), torch.rand(1, 3, 2, 2, 2, 2), torch.ones(1, 3, 2, 2, 2)
    assert type(attend(value, sizes, None, where, weights)) is torch.Tensor


def test_the_reference_takes_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = make()
    with FakeTensorMode() as mode:
        output = attend(*(mode.from_tensor(tensor) for tensor in inputs), backend="reference")
    assert output.shape == (2, 5, 16)


def test_meta_tensors_get_shapes_and_checks():
    inputs = make(torch.float32)
    meta = [tensor.to("meta") for tensor in inputs]
    assert attend(*meta).shape == (2, 5, 16)
    with pytest.raises(ValueError, match="sampling_locations must be"):
        attend(*meta[:3], meta[3][:, :, :, :1], meta[4])


MISTAKES = {
    "value must be [B, S, M, D]": lambda i: {"value": i.value[0]},
    "S=36 pixels": lambda i: {
        "spatial_shapes": i.spatial_shapes + 1,
        "level_start_index": torch.tensor([0, 42]),
    },
    "without gap or overlap": lambda i: {"level_start_index": torch.tensor([0, 6])},
    "spatial_shapes must be [L, 2]": lambda i: {"spatial_shapes": i.spatial_shapes.flatten()},
    "level_start_index must be [L] with L=2": lambda i: {"level_start_index": torch.tensor([0])},
    "with B=2, M=2, L=2, got [2, 5, 2, 1, 3, 2]": lambda i: {
        "sampling_locations": i.sampling_locations[:, :, :, :1]
    },
    "got [1, 5, 2, 2, 3, 2]": lambda i: {"sampling_locations": i.sampling_locations[:1]},
    "attention_weights must be [2, 5, 2, 2, 3]": lambda i: {
        "attention_weights": i.attention_weights[..., :2]
    },
    "method must be 'bilinear' or 'nearest', got 'cubic'": lambda i: {"method": "cubic"},
    "points_per_level must be L=2 numbers": lambda i: {
        "points_per_level": [6],
        "sampling_locations": i.sampling_locations.flatten(3, 4),
    },
    "K=7 points in all": lambda i: {
        "points_per_level": [4, 3],
        "sampling_locations": i.sampling_locations.flatten(3, 4),
    },
    "at most 65535 points in all": lambda i: {
        "points_per_level": [1, 2**16],
        "sampling_locations": i.sampling_locations.new_zeros(2, 5, 2, 1 + 2**16, 2),
        "attention_weights": i.attention_weights.new_zeros(2, 5, 2, 1 + 2**16),
    },
    "backend must be one of": lambda i: {"backend": "tpu"},
    "on value's device cpu, got meta": lambda i: {"attention_weights": i.attention_weights.to("meta")},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    inputs = make()
    arguments = {**vars(inputs), **MISTAKES[message](inputs)}
    with pytest.raises(ValueError) as error:
        vitkern.ms_deform_attn(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
def test_integer_tensors_are_refused(name, autocast):
    inputs = make(torch.float32)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match=name):
        vitkern.ms_deform_attn(**{**vars(inputs), name: getattr(inputs, name).long()})


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


TYPES = {
    "spatial_shapes must be an int64 tensor or pairs of whole numbers": lambda i: {
        "spatial_shapes": [(6, 5, 1), (3, 2, 1)]
    },
    "pairs of whole numbers, got [(6.0, 5), (3, 2)]": lambda i: {"spatial_shapes": [(6.0, 5), (3, 2)]},
    "spatial_shapes must be int64, got torch.float32": lambda i: {"spatial_shapes": i.spatial_shapes.float()},
    "level_start_index must be int64, got torch.float64": lambda i: {
        "level_start_index": i.level_start_index.double()
    },
    "level_start_index must be an int64 tensor or whole numbers, got [0.0, 30]": lambda i: {
        "level_start_index": [0.0, 30]
    },
    "points_per_level must be whole numbers, got 6": lambda i: {"points_per_level": 6},
    "value must be a tensor, got list": lambda i: {
        "value": i.value.tolist(),
        "spatial_shapes": [(6, 5), (3, 2)],
    },
    "value must be a dense tensor, got torch.sparse_coo": lambda i: {"value": i.value.to_sparse()},
    "attention_weights must be a dense tensor, got torch.sparse_coo": lambda i: {
        "attention_weights": i.attention_weights.to_sparse()
    },
    "sampling_locations must be a tensor, got list": lambda i: {
        "sampling_locations": i.sampling_locations.tolist()
    },
}


@pytest.mark.parametrize("message", TYPES)
def test_a_wrong_type_is_named(message):
    inputs = make()
    with pytest.raises(TypeError) as error:
        vitkern.ms_deform_attn(**{**vars(inputs), **TYPES[message](inputs)})
    assert message in str(error.value)


def test_first_pixels_may_be_given_as_numbers():
    inputs = make()
    given = {**vars(inputs), "level_start_index": [0, 30]}
    assert torch.equal(vitkern.ms_deform_attn(**given), attend(*inputs))


@pytest.mark.parametrize(
    "grad_output, got",
    [
        (torch.ones(2, 5, 16), "torch.float32 on cpu"),
        (torch.ones(2, 5, 16, dtype=torch.float64, device="meta"), "torch.float64 on meta"),
        (torch.ones(2, 5, 8, dtype=torch.float64), r"\[2, 5, 8\] of torch.float64"),
    ],
    ids=["dtype", "device", "shape"],
)
def test_a_wrong_grad_output_is_named(grad_output, got):
    with pytest.raises(ValueError, match=f"ms_deform_attn: grad_output must be .*, got .*{got}"):
        BACKWARD(grad_output, (True, True, True), *make())


def test_a_call_is_described_alike_with_and_without_dlpack(monkeypatch):
    """Torch below 2.10 is asked attribute by attribute."""
    asking = _C.Describer(direct._tell, torch.Tensor, torch.nn.Parameter)
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
