# SPDX-License-Identifier: Apache-2.0
"""The op in LibreYOLO's kernel registry, of which there is a stand-in here, from its interface."""

import importlib
import sys

import pytest
import torch

from tests.test_compat_deformable_detr import SHAPES, formula, leaves, make

# The newest that takes a call runs. Its own kernels register at the first call, and the choice is remembered.
REGISTRY = """
import importlib
own = "libreyolo.kernels.attention.ms_deform_attn"
slots, chosen = {}, {}

def register(op, impl, *, name):
    slots.setdefault(op, []).insert(0, (name, impl))

def unregister(op, name):
    slots[op] = [each for each in slots.get(op, []) if each[0] != name]

def clear_cache():
    chosen.clear()

def resolve(op):
    importlib.import_module(own)
    if op not in chosen:
        chosen[op] = slots[op][0] if slots.get(op) else None
    return chosen[op]

def run(*tensors):
    if resolve("ms_deform_attn") is not None:
        for name, impl in slots["ms_deform_attn"]:
            output = impl(*tensors)
            if output is not None:
                return name, output
    return "portable", None
"""
THEIRS = "from libreyolo import kernels\n"
HUB = 'kernels.register("ms_deform_attn", lambda *_: "hub", name="hub")\n'


@pytest.fixture(params=["", HUB], ids=["alone", "with a kernel of its own"])
def registry(request, tmp_path, monkeypatch):
    """The registry and our module for it."""
    files = {"__init__": "", "kernels/__init__": REGISTRY, "kernels/attention/__init__": ""}
    for name, text in {**files, "kernels/attention/ms_deform_attn": THEIRS + request.param}.items():
        path = (tmp_path / "libreyolo" / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    ours = importlib.import_module("vitkern.compat.libreyolo")
    yield importlib.import_module("libreyolo.kernels"), ours
    for name in set(sys.modules) - before:
        if name.startswith("libreyolo") or name == "vitkern.compat.libreyolo":
            del sys.modules[name]


def inputs():
    value, _, _, locations, weights = leaves(make())
    return value, SHAPES, locations, weights


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a call"])
def test_the_op_comes_first(registry, used):
    kernels, ours = registry
    before = kernels.run(*inputs())[0] if used else None
    ours.register()
    ours.register()
    given = inputs()
    name, output = kernels.run(*given)
    assert name == "vitkern" and [each for each, _ in kernels.slots["ms_deform_attn"]].count("vitkern") == 1
    value, shapes, locations, weights = theirs = inputs()
    expected = formula((value, shapes, None, locations, weights))
    torch.testing.assert_close(output, expected)
    differentiable = [0, 2, 3]
    gradients = torch.autograd.grad(output.square().sum(), [given[at] for at in differentiable])
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.square().sum(), [theirs[at] for at in differentiable])
    )
    ours.unregister()
    after = kernels.run(*inputs())[0]
    assert after != "vitkern" and after == (before or after)


def test_another_device_is_for_the_next(registry):
    kernels, ours = registry
    ours.register()
    value, shapes, locations, weights = inputs()
    assert kernels.run(*(each.to("meta") for each in (value, shapes, locations, weights)))[0] != "vitkern"


def test_values_in_16_bits_with_locations_in_32(registry):
    kernels, ours = registry
    ours.register()
    value, shapes, locations, weights = inputs()
    name, output = kernels.run(value.bfloat16(), shapes, locations, weights)
    expected = formula((value.bfloat16().float(), shapes, None, locations, weights))
    assert name == "vitkern" and output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=1e-2, rtol=1e-2)
