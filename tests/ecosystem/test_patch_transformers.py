# SPDX-License-Identifier: Apache-2.0
"""Every family of transformers with multi-scale deformable attention computes the same, patched and unpatched."""

import contextlib
import importlib
import subprocess
import sys
from unittest import mock

import pytest
import torch

import vitkern
from tests.ecosystem import families
from tests.ecosystem.families import FAMILIES, build, inputs, tensors
from vitkern.compat import forms
from vitkern.compat.transformers import FAMILIES as LAYERS

pytest.importorskip("transformers")

DISCRETE = ("rt_detr_v2", "d_fine", "deimv2")


@pytest.fixture(params=FAMILIES)
def family(request):
    if not families.is_installed(request.param):
        pytest.skip(f"the installed transformers has no {request.param}")
    return request.param


def layers_of(model):
    name = "MultiscaleDeformableAttention"
    return {path: module for path, module in model.named_modules() if type(module).__name__.endswith(name)}


def recorded(model, given):
    """By path, the arguments that each layer is called with."""
    calls, handles = {}, []
    for path, layer in layers_of(model).items():

        def record(layer, positional, named, path=path):
            calls[path] = (positional, named)

        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    model(**given)
    for handle in handles:
        handle.remove()
    return calls


def run(layer, positional, named):
    """Output, weights, and the gradients of all floating arguments and parameters."""
    leaves = {
        key: each.detach().clone().requires_grad_()
        for key, each in [*enumerate(positional), *named.items()]
        if isinstance(each, torch.Tensor) and each.is_floating_point()
    }
    positional = [leaves.get(index, each) for index, each in enumerate(positional)]
    output, weights = layer(*positional, **{key: leaves.get(key, each) for key, each in named.items()})
    wanted = {**leaves, **dict(layer.named_parameters())}
    down = torch.linspace(-1, 1, output.numel()).view_as(output)
    loss = (output * down).sum() + (weights * weights).sum()
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return output, weights, dict(zip(wanted, gradients))


def check_layers(model, given):
    calls = recorded(model, given)
    before = {path: run(layer, *calls[path]) for path, layer in layers_of(model).items()}
    table = vitkern.patch(model)
    assert not table.left and {path for row in table for path in row.paths} == set(calls) != set()
    for path, layer in layers_of(model).items():
        (output, weights, gradients), (ours, our_weights, our_gradients) = before[path], run(layer, *calls[path])
        torch.testing.assert_close(ours, output, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(our_weights, weights, atol=1e-6, rtol=1e-5)
        for key, gradient in gradients.items():
            if gradient is None:
                assert our_gradients[key] is None, key
            else:
                assert (our_gradients[key] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), (path, key)


def test_layers(family):
    check_layers(build(family), inputs(family))


@pytest.mark.parametrize("name", DISCRETE)
def test_layers_that_take_the_nearest_pixel(name):
    if not families.is_installed(name):
        pytest.skip(f"the installed transformers has no {name}")
    check_layers(build(name, decoder_method="discrete"), inputs(name))


@contextlib.contextmanager
def same_choices(choices):
    """torch.topk gives what it gave in the first run, where one near tie in another order moves all that follows."""
    original, replay = torch.topk, iter(list(choices))

    def topk(values, *positional, **named):
        if not choices_were_made:
            choices.append(original(values, *positional, **named).indices)
            return original(values, *positional, **named)
        chosen = next(replay)
        return torch.return_types.topk((values.gather(-1, chosen), chosen))

    choices_were_made = bool(choices)
    with mock.patch("torch.topk", topk):
        yield


def outputs(model, given, choices):
    with torch.no_grad(), same_choices(choices):
        return tensors(model(**given))


@pytest.mark.parametrize("target", ["model", "library"])
def test_whole_output(family, target):
    model, given, choices = build(family), inputs(family), []
    expected = outputs(model, given, choices)
    with vitkern.patched(model if target == "model" else "transformers") as table:
        found = outputs(model, given, choices)
    assert table and found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-4, msg=lambda text: f"{key}: {text}")
    with torch.no_grad():
        calls = recorded(model, given)
    for path, layer in layers_of(model).items():  # out again
        assert not forms.is_ours(type(layer).forward), path
    assert calls


def test_attentions_are_those_of_the_unpatched_model(family):
    model, given = build(family), inputs(family)
    with torch.no_grad():
        expected = tensors(model(**given, output_attentions=True))
        vitkern.patch(model)
        found = tensors(model(**given, output_attentions=True))
    vitkern.unpatch(model)
    attentions = [key for key in expected if "attentions" in key]
    assert found.keys() == expected.keys()
    for key in attentions:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)
    assert not any(forms.is_ours(layer.forward) for layer in layers_of(model).values())


def test_names_are_those_of_the_library(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert hasattr(module, f"{LAYERS[family]}MultiscaleDeformableAttention")


def losses(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    found = []
    for batch in batches:
        torch.manual_seed(0)  # dropout, and the points that Mask2Former's loss is taken at
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def labels_of(family, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, families.SIZE, families.SIZE, generator=generator)
    if family == "mask2former":
        masks = (torch.rand(2, 3, families.SIZE, families.SIZE, generator=generator) > 0.5).float()
        classes = torch.randint(0, 2, (2, 3), generator=generator)
        return dict(pixel_values=images, mask_labels=list(masks), class_labels=list(classes))
    boxes = torch.rand(2, 3, 4, generator=generator) * 0.2 + 0.3
    classes = torch.randint(0, 2, (2, 3), generator=generator)
    return dict(
        pixel_values=images, labels=[dict(class_labels=c, boxes=b) for c, b in zip(classes, boxes)]
    )


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former"])
def test_three_training_steps(name):
    pytest.importorskip("scipy", reason="the losses match by scipy")
    batches = [labels_of(name, seed) for seed in range(3)]
    expected = losses(build(name).train(), batches)
    model = build(name).train()
    assert vitkern.patch(model)
    assert losses(model, batches) == pytest.approx(expected, rel=1e-4)
    assert expected[0] != expected[2]


LATER = """
import vitkern
table = vitkern.patch("transformers")
assert table and all("when imported" in row.place for row in table), table
from transformers.models.{family} import modeling_{family} as module
assert hasattr(module.{name}.forward, "replaces")
undone = vitkern.unpatch("transformers")
assert undone and not hasattr(module.{name}.forward, "replaces"), undone
assert not vitkern.unpatch("transformers")
"""


def test_a_module_that_is_imported_later():
    name = "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention"
    script = LATER.format(family="mask2former", name=name)
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_library_twice():
    build("mask2former")
    with vitkern.patched("transformers") as table:
        assert table and "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention" in str(table)
        assert not vitkern.patch("transformers")
        assert not vitkern.patch(build("mask2former"))
    assert not vitkern.unpatch("transformers")


def test_a_release_with_another_name():
    module = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    name = "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention"
    layer = getattr(module, name)
    with mock.patch.object(module, name):
        delattr(module, name)
        with pytest.raises(RuntimeError, match=f"has no {name}. Nothing was patched"):
            vitkern.patch("transformers")
        setattr(module, name, layer)
    assert not vitkern.unpatch("transformers")


def test_a_release_with_another_forward(monkeypatch):
    model = build("deformable_detr")
    layer = type(model.model.encoder.layers[0].self_attn)

    def forward(self, hidden_states, encoder_hidden_states, rotary):
        return self.rotate(hidden_states, rotary)

    monkeypatch.setattr(layer, "forward", forward)
    for target in (model, "transformers"):
        with pytest.raises(RuntimeError, match=r"DeformableDetrMultiscale.*'attention_weights'.*Nothing was patched"):
            vitkern.patch(target)
    assert not vitkern.unpatch(model) and not vitkern.unpatch("transformers")
