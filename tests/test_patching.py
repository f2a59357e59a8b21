# SPDX-License-Identifier: Apache-2.0
"""vitkern.patch of models with layers of other projects. Tests with transformers are in tests/ecosystem."""

import functools
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import vitkern
from tests.layers_of_others import MSDeformAttn, MultiScaleDeformableAttention
from vitkern.compat import patching

SHAPES, STARTS = torch.tensor([[6, 5], [3, 2]]), torch.tensor([0, 30])


class Model(nn.Module):
    """Two layers with other modules around them."""

    def __init__(self, make=MSDeformAttn):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(32, 3)
        for layer in self.layers:
            nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
            nn.init.normal_(layer.attention_weights.weight)

    def forward(self, query, pixels, points):
        for layer in self.layers:
            query = query + layer(query, points, pixels, SHAPES, STARTS)
        return self.head(query)


def batch(last=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 7, 32), (2, 36, 32), (2, 7, 2, last))
    query, pixels, points = (torch.rand(size, generator=generator) for size in sizes)
    return query.to(dtype), pixels.to(dtype), points.to(dtype)


def is_patched(model):
    return [hasattr(type(layer), "patched_from") for layer in model.layers]


def gradients(model, inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = model(*leaves)
    return output, torch.autograd.grad(output.square().sum(), [*leaves, *model.parameters()])


@pytest.mark.parametrize("last", [2, 4])
def test_deformable_detr(last):
    model, inputs = Model(), batch(last)
    expected, expected_gradients = gradients(model, inputs)
    table = vitkern.patch(model)
    assert [(row.place, row.was, row.now, row.fused) for row in table] == [
        ("layers.*", "MSDeformAttn", "ms_deform_attn_fused", True)
    ]
    assert (
        table.rows[0].paths == ("layers.0", "layers.1") and not table.left and is_patched(model) == [True] * 2
    )
    output, found = gradients(model, inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(found, expected_gradients):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [(), ("value", "identity", "query_pos", "key_padding_mask")])
def test_mmcv(batch_first, given):
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(batch_first=batch_first).eval()
    nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[1, 20:30] = True
    queries = 7 if "value" in given else 36
    named = dict(value=torch.randn(2, 36, 32), key_padding_mask=mask)
    named |= {name: torch.randn(2, queries, 32) for name in ("query", "identity", "query_pos")}
    named = {name: named[name] for name in ("query", *given)}
    if not batch_first:
        named = {name: x if x.dtype == torch.bool else x.transpose(0, 1) for name, x in named.items()}
    named |= dict(
        reference_points=torch.rand(2, queries, 2, 2), spatial_shapes=SHAPES, level_start_index=STARTS
    )
    expected = layer(**named)
    with vitkern.patched(layer) as table:
        assert [(row.place, row.was) for row in table] == [("", "MultiScaleDeformableAttention")]
        torch.testing.assert_close(layer(named.pop("query"), **named), expected, atol=1e-5, rtol=1e-4)


def test_a_padding_mask():
    layer, (query, pixels, points) = Model().layers[0], batch()
    mask = torch.arange(36).expand(2, -1) > 20
    expected = layer(query, points, pixels, SHAPES, STARTS, mask)
    vitkern.patch(layer)
    torch.testing.assert_close(
        layer(query, points, pixels, SHAPES, STARTS, input_padding_mask=mask), expected
    )


def test_it_stays_the_same_object():
    model, seen = Model(), []
    layer, keys = model.layers[0], list(model.state_dict())
    parameters = dict(model.named_parameters())
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vitkern.patch(model)
    assert model.layers[0] is layer and list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    before = layer.value_proj.weight.clone()
    model(*batch()).sum().backward()
    optimizer.step()
    assert seen == ["forward"] and not torch.equal(layer.value_proj.weight, before)
    assert isinstance(layer, MSDeformAttn) and type(layer).__name__ == "MSDeformAttn"
    assert "on vitkern.ms_deform_attn_fused" in repr(layer)


def test_in_and_out_again():
    model = Model()
    assert not vitkern.unpatch(model)
    assert vitkern.patch(model) and not vitkern.patch(model)
    undone = vitkern.unpatch(model)
    assert [(row.place, row.now) for row in undone] == [("layers.*", "MSDeformAttn")]
    assert not vitkern.unpatch(model) and all(type(layer) is MSDeformAttn for layer in model.layers)


def test_patched_leaves_what_was_patched_before():
    model = Model()
    vitkern.patch(model.layers[0])
    with vitkern.patched(model) as table:
        assert [row.paths for row in table] == [("layers.1",)] and is_patched(model) == [True, True]
    assert is_patched(model) == [True, False]
    with pytest.raises(KeyError), vitkern.patched(model):
        raise KeyError
    assert is_patched(model) == [True, False]


def test_patched_goes_by_layers_and_not_by_their_places():
    model = Model()
    kept, lost = model.layers
    vitkern.patch(kept)
    with vitkern.patched(model):
        model.layers = nn.ModuleList([MSDeformAttn(), kept])
    assert is_patched(model) == [False, True] and type(lost) is MSDeformAttn


def test_two_threads_patch_a_layer_once(monkeypatch):
    model, change = Model(), patching._change_class
    other = threading.Thread(target=vitkern.patch, args=(model,))

    def change_slowly(module, kind):
        if other.ident is None:
            other.start()
            other.join(timeout=0.3)
        change(module, kind)

    monkeypatch.setattr(patching, "_change_class", change_slowly)
    vitkern.patch(model)
    other.join()
    assert [type(layer).patched_from for layer in model.layers] == [MSDeformAttn] * 2


def test_a_class_made_from_a_patched_one_is_named():
    """torch.distributed.fsdp.fully_shard and parametrize make such classes."""
    layer = MSDeformAttn()
    vitkern.patch(layer)
    kind = type(layer)
    layer.__class__ = type("FSDPMSDeformAttn", (kind,), {})
    table = vitkern.unpatch(layer)
    assert not table and "(FSDPMSDeformAttn): its class was made from the patched one" in str(table)
    layer.__class__ = kind
    assert vitkern.unpatch(layer) and type(layer) is MSDeformAttn


def test_a_parametrized_layer_stays():
    """To remove a parametrization, torch deletes a property of the layer's class, which a patch would have replaced."""
    model, inputs = Model(), batch()
    for layer in model.layers:
        layer.register_parameter("factor", nn.Parameter(torch.ones(1)))
        parametrize.register_parametrization(layer, "factor", nn.Identity())
    table = vitkern.patch(model)
    assert not table and "layers.0 (ParametrizedMSDeformAttn): a tensor of its own is parametrized" in str(
        table
    )
    for layer in model.layers:
        parametrize.remove_parametrizations(layer, "factor")
    assert vitkern.patch(model) and model(*inputs) is not None


def test_a_layer_of_parametrized_ones_is_patched():
    model, inputs = Model(), batch()
    for layer in model.layers:
        parametrizations.weight_norm(layer.value_proj)
    expected = model(*inputs)
    assert vitkern.patch(model)
    torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-4)


def test_a_model_without_such_layers():
    table = vitkern.patch(nn.Sequential(nn.Linear(2, 2), vitkern.nn.MSDeformAttn(32, 2, 4, 4)))
    assert not table and len(table) == 0 and str(table) == "nothing was replaced"


@pytest.mark.parametrize("target", ["transfomers", "mmcv", None, 3, [], MSDeformAttn])
def test_what_is_neither_model_nor_library(target):
    for function in (vitkern.patch, vitkern.unpatch):
        with pytest.raises(
            ValueError, match=r"takes a torch.nn.Module or the name of a library, 'transformers', got"
        ):
            function(target)


def test_a_layer_that_is_used_twice():
    model = Model()
    model.layers[1] = model.layers[0]
    assert vitkern.patch(model).rows[0].paths == ("layers.0",) and is_patched(model) == [True, True]


class Tuned(MSDeformAttn):
    """A subclass with another constructor and the same forward."""

    def __init__(self):
        super().__init__(n_points=2)


class Gated(MSDeformAttn):
    """A subclass with another result."""

    def forward(self, *inputs):
        return 2 * super().forward(*inputs)


class Renamed(MSDeformAttn):
    """A subclass whose forward has the same arguments, and runs a gate only."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 32)

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index):
        return self.gate(query)


def test_a_subclass_with_the_same_forward():
    model, inputs = Model(Tuned), batch()
    expected = model(*inputs)
    assert vitkern.patch(model).rows[0].was == "Tuned"
    torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-4)
    assert isinstance(pickle.loads(pickle.dumps(model)).layers[0], Tuned)


@pytest.mark.parametrize("kind", [Gated, Renamed])
def test_a_subclass_with_another_forward_stays(kind):
    model, inputs = Model(kind), batch()
    expected = model(*inputs)
    table = vitkern.patch(model)
    assert not table and [left.path for left in table.left] == ["layers.0", "layers.1"]
    assert f"left as it is: layers.0 ({kind.__name__}): its " in str(table)
    assert torch.equal(model(*inputs), expected)


class Overwriting(MSDeformAttn):
    """A subclass whose forward changes one of its arguments in place."""

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index):
        output = super().forward(
            query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index
        )
        input_level_start_index[:] = 0
        return output


def test_a_forward_that_changes_an_argument_stays():
    table = vitkern.patch(Model(Overwriting))
    assert not table and table.left[0].reason == "its forward changes its argument input_level_start_index"


def test_a_decorated_forward_stays():
    """functools.wraps shows only the inner forward; the wrapper around it must be tried too."""

    class Doubled(MSDeformAttn):
        @functools.wraps(MSDeformAttn.forward)
        def forward(self, *inputs):
            return 2 * MSDeformAttn.forward(self, *inputs)

    model, inputs = Model(Doubled), batch()
    expected = model(*inputs)
    table = vitkern.patch(model)
    assert not table and table.left[0].reason.startswith("its forward raises in a trial: TypeError")
    assert torch.equal(model(*inputs), expected)


def test_a_forward_that_was_set_on_the_layer_stays():
    model, inputs = Model(), batch()
    original = model.layers[0].forward
    model.layers[0].forward = lambda *tensors: 0 * original(*tensors)
    expected = model(*inputs)
    table = vitkern.patch(model)
    assert [row.paths for row in table] == [("layers.1",)]
    assert [(left.path, "set on the layer" in left.reason) for left in table.left] == [("layers.0", True)]
    torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-4)


def test_a_forward_that_was_set_on_a_patched_layer_stays():
    model, inputs = Model(), batch()
    vitkern.patch(model)
    ours = model.layers[0].forward
    model.layers[0].forward = lambda *tensors: 0 * ours(*tensors)
    expected = model(*inputs)
    table = vitkern.unpatch(model)
    assert [row.paths for row in table] == [("layers.1",)] and "set on the layer" in table.left[0].reason
    torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-4)
    del model.layers[0].forward
    assert vitkern.unpatch(model) and is_patched(model) == [False, False]


def test_a_bound_method_left_behind_is_no_obstacle():
    model = Model()
    for layer in model.layers:
        layer.forward = layer.forward
    assert vitkern.patch(model) and all("forward" not in vars(layer) for layer in model.layers)
    for layer in model.layers:
        layer.forward = layer.forward
    assert vitkern.unpatch(model) and all("forward" not in vars(layer) for layer in model.layers)


def test_nothing_is_left_half_patched(monkeypatch):
    model, change = Model(), patching._change_class

    def fails(module, kind):
        if module is model.layers[1]:
            raise RuntimeError("no")
        change(module, kind)

    monkeypatch.setattr(patching, "_change_class", fails)
    with pytest.raises(RuntimeError, match="no"):
        vitkern.patch(model)
    assert is_patched(model) == [False, False]


def test_arguments_that_only_the_original_understands():
    layer, (query, pixels, points) = Model().layers[0], batch()
    vitkern.patch(layer)
    with pytest.raises(ValueError, match="Last dim of reference_points must be 2 or 4, got 3"):
        layer(query, torch.rand(2, 7, 2, 3), pixels, SHAPES, STARTS)
    with pytest.raises(TypeError, match="missing"):
        layer(query, points)
    with pytest.raises(TypeError, match=r"MSDeformAttn.forward\(\) takes from 6 to 7 positional"):
        layer(query, points, pixels, SHAPES, STARTS, None, None)
    with pytest.raises(TypeError, match=r"MSDeformAttn.forward\(\) got an unexpected .* 'mask'"):
        layer(query, points, pixels, SHAPES, STARTS, mask=None)


class Gained(MSDeformAttn):
    """A subclass with an argument that has no role and is absent from all trials."""

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
        gain=1.0,
        **others,
    ):
        levels = (input_spatial_shapes, input_level_start_index)
        return super().forward(query, reference_points, input_flatten, *levels, input_padding_mask) * gain


@pytest.mark.parametrize(("extra", "runs"), [({"key_pos": 3}, True), ({"gain": 2.0}, False)])
def test_arguments_that_no_trial_has_given(extra, runs):
    """Extra arguments that the code ignores have no effect; with an argument that it uses, the original runs."""
    layer, (query, pixels, points) = Gained(), batch()
    inputs = (query, points, pixels, SHAPES, STARTS)
    expected = layer(*inputs, **extra)
    assert vitkern.patch(layer)
    assert (type(layer).patched_by.run(layer, inputs, extra) is NotImplemented) != runs
    torch.testing.assert_close(layer(*inputs, **extra), expected, atol=1e-5, rtol=1e-4)
