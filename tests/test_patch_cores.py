# SPDX-License-Identifier: Apache-2.0
"""In a layer of no known form, the kernel replaces the function that samples, and nothing else changes."""

import copy
import inspect
import sys
import types

import pytest
import torch
from torch import nn

import vitkern
from tests import cores_of_others as others
from tests.patched import kernels_in, model_of, near, same

each_holder = pytest.mark.parametrize("kind", others.HOLDERS, ids=lambda kind: kind.__name__)


def inputs() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x, points, pixels = (torch.rand(2, n, c, generator=draw) for n, c in ((5, 32), (5, 2), (16, 32)))
    return x.requires_grad_(), points, pixels.requires_grad_(), torch.tensor([[3, 4], [2, 2]])


def results(model: nn.Module) -> list[torch.Tensor]:
    x, points, pixels, shapes = inputs()
    output, where = model[0](x, points, pixels, shapes)
    gradients = torch.autograd.grad(
        output.square().sum(), [x, pixels, *model.parameters()], allow_unused=True
    )
    return [output.detach(), where.detach(), *(each for each in gradients if each is not None)]


@each_holder
def test_two_models_of_one_project(kind):
    """The patched model has the same results, on the kernel. The other keeps its function and bitwise results."""
    ours, other = model_of(kind), model_of(kind)
    space, own = dict(vars(others)), dict(vars(ours[0]))
    expected = results(ours)
    table = vitkern.patch(ours, strict=True)
    assert [row.now for row in table] == ["ms_deform_attn"] and not table.left
    assert near(results(ours), expected) and not same(results(ours), expected)
    assert type(other[0]) is kind and same(results(other), expected)
    assert not vitkern.patch(ours)
    assert near(results(copy.deepcopy(ours)), expected) and not same(results(copy.deepcopy(ours)), expected)
    assert vars(ours[0]).keys() == own.keys()
    vitkern.unpatch(ours)
    assert type(ours[0]) is kind and same(results(ours), expected) and same(results(other), expected)
    assert dict(vars(others)) == space


@each_holder
def test_it_compiles_as_one_graph(kind):
    model = model_of(kind)
    vitkern.patch(model)
    assert kernels_in(model, inputs()) == 1


FAULTS = {
    "align_corners=False": "align_corners=True",
    '"zeros"': '"border"',
    '"bilinear"': '"nearest"',
    "2 * locations - 1": "2 * locations - 1.01",
    "* weights).sum(-1)": "* weights).mean(-1)",
    "grid, (height, width) in": "grid, (width, height) in",
    "weights = weights.transpose": "weights = weights.detach().transpose",
    "return output.view": "if channels > 64:\n        output = output * 2\n    return output.view",
    "found = []": "found = []\n    locations = locations.clamp(0, 1)",
    ".transpose(1, 2)\n\n\ndef multi": ".transpose(1, 2).to(torch.float32) * (1 if batch < 9 else 2)\n\n\ndef multi",
    "found.append(F.grid_sample(": "found.insert(0, F.grid_sample(",
}


def project(name: str, old: str = "", new: str = "") -> types.ModuleType:
    """A module with the functions and layers of another project, with the text `old` replaced by `new`."""
    source = inspect.getsource(others)
    assert source.count(old) == 1 or not old
    module = types.ModuleType(name)
    exec(compile(source.replace(old, new) if old else source, f"<{name}>", "exec"), vars(module))
    return module


@pytest.mark.parametrize("kind", ["OfGlobal", "OfPartial", "OfLevels"])
@pytest.mark.parametrize("old", FAULTS, ids=lambda old: FAULTS[old].split("\n")[0][:30])
def test_a_function_with_a_fault_stays(old, kind):
    model = model_of(getattr(project("faulty", old, FAULTS[old]), kind))
    expected = results(model)
    table = vitkern.patch(model)
    assert not table and len(table.left) == 1 and " " in table.left[0].reason, table
    assert same(results(model), expected)


def test_a_function_replaced_later_runs(monkeypatch):
    module = project("changing")
    model = model_of(module.OfGlobal)
    vitkern.patch(model)
    monkeypatch.setattr(module, "multi_scale_deformable_attn_pytorch", lambda value, *_: value.sum() + 1)
    with pytest.warns(UserWarning, match="multi_scale_deformable_attn_pytorch"):
        output, _ = model[0](*inputs())
    assert output.dim() == 0


def test_a_module_is_patched_for_the_whole_process(monkeypatch):
    module = project("whole")
    monkeypatch.setitem(sys.modules, "whole", module)
    model = model_of(module.OfHelper)
    expected, original = results(model), module.multi_scale_deformable_attn_pytorch
    table = vitkern.patch("whole")
    assert "for the whole process" in str(table) and "whole.multi_scale_deformable_attn_pytorch" in str(table)
    assert near(results(model), expected) and not same(results(model), expected)
    assert kernels_in(model, inputs()) == 1
    assert not vitkern.patch("whole")
    assert vitkern.unpatch("whole")
    assert module.multi_scale_deformable_attn_pytorch is original and same(results(model), expected)


def test_a_tensor_where_a_list_was_tried_goes_to_the_function():
    model = model_of(others.OfLevels)
    vitkern.patch(model)
    levels = torch.rand(1, 2, 4, 8, 12), [[3, 4]], torch.rand(2, 5, 4, 3, 2), torch.rand(2, 5, 4, 3), [3]
    assert model[0].core is not vars(model[0])["core"]
    assert torch.equal(model[0].core(*levels), others.core_of_levels(*levels))


def test_code_that_a_copy_would_change_is_left():
    source = (
        "    return multi_scale_deformable_attn_pytorch(value, shapes, where, weights)\n\n\nclass OfHelper"
    )
    module = project("counting", source, "    global calls\n    calls = 1\n" + source)
    table = vitkern.patch(model_of(module.OfHelper))
    assert not table and "changes the global 'calls'" in table.left[0].reason
