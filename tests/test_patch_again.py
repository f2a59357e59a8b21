# SPDX-License-Identifier: Apache-2.0
"""Patched layers whose attributes, functions and modules are replaced, and pickles that name what is not theirs."""

import importlib
import inspect
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import vitkern
from tests import cores_of_others as others
from tests.layers_of_others import MultiScaleDeformableAttention
from tests.patched import model_of, near, same
from tests.test_patch_cores import project, results
from tests.test_patching import SHAPES, STARTS, Model, batch

CORE = "multi_scale_deformable_attn_pytorch"


class Twice(nn.Module):
    def forward(self, *given):
        return 2 * others.multi_scale_deformable_attn_pytorch(*given)


@pytest.mark.parametrize("other", [Twice(), lambda *given: 2 * Twice()(*given)], ids=["child", "function"])
def test_an_attribute_that_holds_a_function_gets_another(other):
    model = model_of(others.OfAttribute)
    vitkern.patch(model, strict=True)
    model[0].core = other
    found = results(model)
    vitkern.unpatch(model)
    assert same(found, results(model)) and model[0].core is other


def test_an_attribute_that_holds_a_function_is_deleted():
    model = model_of(others.OfAttribute)
    vitkern.patch(model, strict=True)
    del model[0].core
    with pytest.raises(AttributeError, match="'OfAttribute' object has no attribute 'core'"):
        results(model)
    with pytest.raises(AttributeError):
        del model[0].core


def copy_of(function):
    return types.FunctionType(function.__code__, function.__globals__, function.__name__)


@pytest.mark.parametrize("name", ["sampled", "helper"])
def test_a_layer_is_tried_again_after_a_change(name, monkeypatch):
    """As the warning says: unpatched and patched, it is on the kernel again, whichever function was replaced."""
    module = project("again")
    model = model_of(module.OfHelper)
    expected = results(model)
    vitkern.patch(model, strict=True)
    monkeypatch.setattr(module, name, copy_of(vars(module)[name]))
    with pytest.warns(UserWarning, match=f"'{name}' has changed since"):
        assert same(results(model), expected)
    vitkern.unpatch(model)
    vitkern.patch(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = results(model)
    assert near(found, expected) and not same(found, expected)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Functions in one module, layers that import them in another."""
    source = inspect.getsource(others)
    end = source.index("class Layer(")
    (tmp_path / "reloaded").mkdir()
    (tmp_path / "reloaded" / "__init__.py").touch()
    (tmp_path / "reloaded" / "ops.py").write_text(source[:end], encoding="utf-8")
    head = "import functools\nfrom torch import nn\nfrom reloaded.ops import *\n"
    (tmp_path / "reloaded" / "layers.py").write_text(head + source[end:], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("reloaded.ops"), importlib.import_module("reloaded.layers")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reloaded"]:
        del sys.modules[name]


def test_a_module_that_is_reloaded_while_it_is_patched(package):
    """The layers' module keeps the earlier function, which unpatch gives back."""
    ops, layers = package
    original = vars(layers)[CORE]
    vitkern.patch("reloaded.ops")
    importlib.reload(ops)
    vitkern.patch("reloaded.ops")
    assert hasattr(vars(ops)[CORE], "samples") and vars(layers)[CORE] is not original
    vitkern.unpatch("reloaded.ops")
    assert vars(layers)[CORE] is original
    assert not any(hasattr(each, "samples") for module in package for each in vars(module).values())
    assert not vitkern.unpatch("reloaded.ops")


def test_a_layer_whose_module_is_reloaded(package):
    """Its class stays the earlier one and runs its own code; layers of the later class are patched by themselves."""
    ops, layers = package
    earlier = model_of(layers.OfGlobal)
    expected = results(earlier)
    vitkern.patch(earlier, strict=True)
    importlib.reload(ops)
    importlib.reload(layers)
    with pytest.warns(UserWarning, match=CORE):
        assert same(results(earlier), expected)
    later = model_of(layers.OfGlobal)
    assert type(later[0]) is not type(earlier[0]).patched_from
    vitkern.patch(later, strict=True)
    assert near(results(later), expected) and not same(results(later), expected)


def test_a_pickle_with_the_name_of_another_proof():
    """As one of another process might have: the layer is tried at its first call."""
    model, other = Model(), MultiScaleDeformableAttention()
    vitkern.patch(nn.ModuleList([model, other]), strict=True)
    names = [type(each).patched_by.name.encode() for each in (model.layers[0], other)]
    data = pickle.dumps(model)
    assert names[0] in data and len(set(map(len, names))) == 1
    assert type(pickle.loads(data).layers[0]) is type(model.layers[0])
    loaded = pickle.loads(data.replace(*names))
    assert type(loaded.layers[0]).patched_by is None
    torch.testing.assert_close(loaded(*batch()), model(*batch()))


def test_a_pickle_with_the_name_of_another_class():
    """The layer is as it was before the patch."""
    models = [model_of(kind) for kind in (others.OfGlobal, others.OfPartial)]
    vitkern.patch(nn.ModuleList(models), strict=True)
    names = [type(model[0]).cores_of.encode() for model in models]
    data = pickle.dumps(models[0])
    assert type(pickle.loads(data)[0]) is type(models[0][0])
    assert type(pickle.loads(data.replace(*names))[0]) is others.OfGlobal


def replica_of(layer):
    """As torch.nn.DataParallel makes one, whose weights are plain tensors."""
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter.clone())
    for name, child in layer._modules.items():
        replica._modules[name] = replica_of(child)
    return replica


def test_replicas_are_on_the_kernel():
    model, (query, pixels, points) = Model(), batch()
    vitkern.patch(model)
    inputs = query, points, pixels, SHAPES, STARTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(replica_of(model.layers[0])(*inputs), model.layers[0](*inputs))
