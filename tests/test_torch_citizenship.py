# SPDX-License-Identifier: Apache-2.0
"""The op in torch: dispatcher, compiler, exporter, autocast, checkpointing, transforms, second derivatives."""

import contextlib
import warnings

import pytest
import torch

import vitkern
from vitkern.cases import MsDeformAttnCase, make_inputs
from vitkern.nn import MSDeformAttn

CASE = MsDeformAttnCase("small", "", 2, ((6, 5), (3, 2)), 5, 2, 8, 3)


def make(dtype=torch.float64, **changes):
    return make_inputs(MsDeformAttnCase(**{**vars(CASE), **changes}), locations="uniform", dtype=dtype)


def attend(value, shapes, starts, locations, weights, **options):
    return vitkern.ms_deform_attn(value, shapes, starts, locations, weights, **options)


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
    """With once_differentiable, as in peers, the second-order term of this loss would silently be zero."""
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
    ):  # a function that cannot be traced must do no harm either
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


def test_inference_mode_and_then_training():
    inputs = make(torch.float32)
    sizes = [(6, 5), (3, 2)]
    args = inputs.sampling_locations, inputs.attention_weights
    with torch.inference_mode():
        attend(inputs.value, sizes, None, *args)
    value = inputs.value.clone().requires_grad_()
    attend(value, sizes, None, *args).sum().backward()
    assert value.grad is not None
