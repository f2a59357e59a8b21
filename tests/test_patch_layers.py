# SPDX-License-Identifier: Apache-2.0
"""In the layers of current projects, the kernel replaces the sampling, and nothing else changes."""

import copy
import inspect
import sys
import types

import pytest
import torch
from torch import nn

import vitkern
from tests import layers_of_others
from tests import layers_today as today
from tests.patched import kernels_in, model_of, near, same

each_kind = pytest.mark.parametrize("kind", today.KINDS, ids=lambda kind: kind.__name__)


def tensors_of(results) -> list[torch.Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def results(model: nn.Module) -> list[torch.Tensor]:
    """Outputs, and the gradients of the inputs and of all parameters."""
    given = model[0].example()
    outputs = tensors_of(model[0](*given))
    flat = [each for one in given for each in (one if isinstance(one, list) else [one])]
    leaves = [each for each in flat if isinstance(each, torch.Tensor) and each.requires_grad]
    loss = sum(each.square().sum() for each in outputs)
    return [*(each.detach() for each in outputs), *_gradients(loss, [*leaves, *model.parameters()])]


def _gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@each_kind
def test_one_of_two_models_is_patched(kind):
    ours, other = model_of(kind), model_of(kind)
    space, expected = dict(vars(today)), results(ours)
    table = vitkern.patch(ours, strict=True)
    assert table and all(row.now == "ms_deform_attn" for row in table)
    found = results(ours)
    assert near(found, expected) and not same(found, expected)
    assert near(results(copy.deepcopy(ours)), expected)
    assert type(other[0]) is kind and same(results(other), expected)
    vitkern.unpatch(ours)
    assert type(ours[0]) is kind and same(results(ours), expected) and same(results(other), expected)
    assert dict(vars(today)) == space


@each_kind
def test_it_compiles_as_one_graph(kind):
    model = model_of(kind)
    vitkern.patch(model)
    assert kernels_in(model, model[0].example()) == 1


def test_a_fused_layer_that_held_an_autograd_function_compiles():
    module = types.ModuleType("classic")
    exec(inspect.getsource(layers_of_others), vars(module))
    module.MSDeformAttnFunction = today.MSDeformAttnFunction
    layer = module.MSDeformAttn(today.WIDTH)
    query, points, pixels, shapes = today.Attention.example()
    assert [row.now for row in vitkern.patch(layer)] == ["ms_deform_attn_fused"]
    given = query, points.expand(-1, -1, today.LEVELS, -1), pixels, shapes, None
    assert kernels_in(nn.Sequential(layer), given) == 1


def project(name: str, old: str = "", new: str = "", monkeypatch=None) -> types.ModuleType:
    """A module with the layers of another project, with the text `old` replaced by `new`."""
    source = inspect.getsource(today)
    assert not old or source.count(old) == 1, source.count(old)
    module = types.ModuleType(name)
    if monkeypatch is not None:
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source.replace(old, new) if old else source, f"<{name}>", "exec"), vars(module))
    return module


FAULTS = {  # text of one core -> other text, and the layer that shows it
    'not in ("mps", "xla")': ('not in ("mps", "cuda")', "Channels"),
    "_locations.ndim == 5": ("_locations.ndim == 5 and levels < 99", "Channels"),
    "if levels == 1 else value.split": ("if levels == 3 else value.split", "Channels"),
    "if merged else sampling_locations.shape[4]": (
        "if merged else 1 * sampling_locations.shape[4] // 1 + 0",
        "",
    ),
    "F.grid_sample(value[level], grid, mode": ("F.grid_sample(value[level] * 1.001, grid, mode", "Maps"),
    "xy.flatten(3, 4), counts), p.flatten(3, 4))": (
        "xy.flatten(3, 4).flip(-1), counts), p.flatten(3, 4))",
        "Nameless",
    ),
    "return gradients[0], None, None, gradients[1]": (
        "return gradients[0], None, None, -gradients[1]",
        "ThreeOutputs",
    ),
    "return gradients[0], None, None": ("return 2 * gradients[0], None, None", "ThreeOutputs"),
    "every = torch.cat([value[level] for": ("every = torch.cat([value[level].detach() for", "Levels"),
}


@pytest.mark.parametrize("old", FAULTS, ids=lambda old: FAULTS[old][0][:40])
def test_a_core_with_a_fault_stays(old):
    new, kind = FAULTS[old]
    model = model_of(getattr(project("faulty", old, new), kind or "Channels"))
    expected = results(model)
    table = vitkern.patch(model)
    if not kind:  # other words, the same numbers
        assert table and not table.left
        return
    assert not table and len(table.left) == 1 and " " in table.left[0].reason, table
    assert same(results(model), expected)


def test_an_autograd_function_is_replaced_for_the_whole_process(monkeypatch):
    module = project("whole_function", monkeypatch=monkeypatch)
    model = model_of(module.ThreeOutputs)
    expected, original = results(model), module.MSDeformAttnFunction
    table = vitkern.patch("whole_function")
    assert "whole_function.MSDeformAttnFunction" in str(table) and "for the whole process" in str(table)
    assert near(results(model), expected) and not same(results(model), expected)
    assert kernels_in(model, model[0].example()) == 1
    assert not vitkern.patch("whole_function")
    vitkern.unpatch("whole_function")
    assert module.MSDeformAttnFunction is original and same(results(model), expected)


def test_an_autograd_function_that_casts_to_sixteen_bits_stays(monkeypatch):
    cast = "    @torch.amp.custom_fwd(cast_inputs=torch.float16, device_type='cuda')\n"
    static = "    @staticmethod\n    def forward("
    project("casting", static, static.replace("    def", cast + "    def"), monkeypatch)
    left = {each.was: each.reason for each in vitkern.patch("casting").left}
    assert "torch.float16 under autocast" in left["MSDeformAttnFunction"]


def test_a_method_that_is_replaced_later_runs(monkeypatch):
    model = model_of(project("replaced").Flat)
    kind = type(model[0])
    vitkern.patch(model)
    monkeypatch.setattr(kind, "forward", lambda self, *given: torch.zeros(1))
    with pytest.warns(UserWarning, match="'forward' has changed"):
        assert model[0](*model[0].example()).shape == (1,)


def test_a_call_that_no_trial_had_goes_to_the_function(monkeypatch):
    """A call that raises without the patch also raises with it: the kernel never runs calls that no trial could run."""
    module = project("untried", monkeypatch=monkeypatch)
    original = module.plain_core
    vitkern.patch("untried")
    assert module.plain_core is not original
    value, shapes = torch.rand(1, 4, 1, 8), torch.tensor([[2, 2]])
    for function in (original, module.plain_core):
        with pytest.raises((IndexError, RuntimeError)):
            function(value, shapes, torch.rand(1, 2, 1, 4, 2), torch.rand(1, 2, 1, 4))
    given = value, shapes, torch.rand(1, 2, 1, 1, 4, 2), torch.rand(1, 2, 1, 1, 4)
    assert torch.allclose(module.plain_core(*given), original(*given), atol=1e-5)
