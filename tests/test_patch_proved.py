# SPDX-License-Identifier: Apache-2.0
"""A layer whose function that samples has ways that the layer never takes: the function's own proof covers them."""

import inspect
import types

import pytest
import torch
from torch import nn

import vitkern
from tests import layer_for_export
from tests.patched import kernels_in, near, same

SIZES = [(3, 4), (2, 2)]


def project(*changes):
    """The functions and the layer as another project's module, with changes."""
    source = inspect.getsource(layer_for_export)
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    module = types.ModuleType("project_of_proofs")
    exec(compile(source, "<project_of_proofs>", "exec"), vars(module))
    return module


def layer_of(module):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = module.Exported()
        nn.init.normal_(layer.sampling_offsets.weight)
        return layer


def results(layer, boxes=False, pairs=True):
    draw = torch.Generator().manual_seed(0)
    sizes = ((2, 5, 32), (2, 16, 32), (2, 5, 1, 4 if boxes else 2))
    query, pixels, points = (torch.rand(size, generator=draw).requires_grad_() for size in sizes)
    named = {"input_spatial_shapes_hw": SIZES} if pairs else {}
    output = layer(query, points, pixels, torch.tensor(SIZES), torch.tensor([0, 12]), **named)
    return output, *torch.autograd.grad(output.square().sum(), [query, pixels, points, *layer.parameters()])


@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("pairs", [False, True], ids=["tensor", "pairs"])
def test_the_layer_is_fused(boxes, pairs):
    layer = layer_of(project())
    expected = results(layer, boxes, pairs)
    table = vitkern.patch(layer, strict=True)
    assert [row.now for row in table] == ["ms_deform_attn_fused"]
    found = results(layer, boxes, pairs)
    assert near(found, expected) and not same(found, expected)
    layer.export = True
    with pytest.warns(UserWarning, match="export"):
        assert near(results(layer, boxes, pairs), expected)


def test_it_compiles_as_one_graph():
    layer = layer_of(project())
    vitkern.patch(layer, strict=True)
    query, pixels, points = torch.rand(2, 5, 32), torch.rand(2, 16, 32), torch.rand(2, 5, 1, 2)
    given = query, points, pixels, torch.tensor(SIZES), torch.tensor([0, 12]), None, SIZES
    assert kernels_in(nn.Sequential(layer), given) == 1


FAULTS = {
    "in the way that the layer never takes": (
        ("return grids[:, :, :, first", "return 1.01 * grids[:, :, :, first"),
    ),
    "in the way that it takes": (("else grids[:, :, :, level]", "else 1.01 * grids[:, :, :, level]"),),
    "of sizes as pairs": (
        ("is not None else value_spatial_shapes", "is None else value_spatial_shapes[:1]"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_function_with_a_fault_proves_nothing(fault):
    table = vitkern.patch(layer_of(project(*FAULTS[fault])))
    assert not table and len(table.left) == 1, table


def test_a_function_inside_that_the_layer_calls_too_is_not_proved():
    """Both of its ways ran in the trial of the function that samples, only one as the layer calls it."""
    spread = "def spread(x):\n    if x.ndim == 5:\n        return x * 1\n    return x\n\n"
    inside = (
        ("def one_axis", f"{spread}def one_axis"),
        ("= 2 * sampling_locations - 1", "= spread(2 * sampling_locations - 1)"),
    )
    alone = vitkern.patch(layer_of(project(*inside)), strict=True)
    assert [row.now for row in alone] == ["ms_deform_attn_fused"]
    table = vitkern.patch(
        layer_of(project(*inside, ("attention_weights(query)", "attention_weights(spread(query))")))
    )
    assert [row.now for row in table] == ["ms_deform_attn"], table


def test_a_function_of_a_way_that_the_layer_never_takes_changes(monkeypatch):
    module = project()
    layer = layer_of(module)
    expected = results(layer)
    vitkern.patch(layer, strict=True)
    monkeypatch.setattr(module, "first", lambda level, points: 0)
    with pytest.warns(UserWarning, match="'first' has changed since"):
        assert same(results(layer), expected)
