# SPDX-License-Identifier: Apache-2.0
"""Every family of transformers with multi-scale deformable attention computes the same, patched and unpatched."""

import contextlib
import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import vitkern
from tests.ecosystem import families
from tests.ecosystem.families import FAMILIES, build, inputs, tensors
from vitkern import cli
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
    """The arguments of each layer's calls, by path."""
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
        (output, weights, gradients), (ours, our_weights, our_gradients) = (
            before[path],
            run(layer, *calls[path]),
        )
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
    """Makes torch.topk repeat the choices of the first run: a near tie in another order would change later results."""
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
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-4)
    assert not any(forms.is_ours(layer.forward) for layer in layers_of(model).values())


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
    return dict(pixel_values=images, labels=[dict(class_labels=c, boxes=b) for c, b in zip(classes, boxes)])


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former"])
def test_three_training_steps(name):
    pytest.importorskip("scipy", reason="the losses match by scipy")
    batches = [labels_of(name, seed) for seed in range(3)]
    expected = losses(build(name).train(), batches)
    model = build(name).train()
    assert vitkern.patch(model)
    assert losses(model, batches) == pytest.approx(expected, rel=1e-4)
    assert expected[0] != expected[2]


@pytest.mark.parametrize("name", ["deformable_detr", "d_fine", "mask2former"])
def test_copies(name, tmp_path):
    model, given = build(name), inputs(name)
    keys = list(model.state_dict())
    vitkern.patch(model)
    twin = copy.deepcopy(model)
    assert all(forms.is_ours(layer.forward) for layer in layers_of(twin).values())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == keys and vitkern.patch(loaded)
    with torch.no_grad():
        expected = tensors(model(**given))
        for each in (twin, loaded):
            found = tensors(each(**given))
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_pickled_layers(family):
    """Pickles layers only: some whole models have hooks of the library that cannot be pickled."""
    model = build(family)
    vitkern.patch(model)
    for layer in layers_of(model).values():
        twin = pickle.loads(pickle.dumps(layer))
        assert type(twin) is type(layer) and forms.is_ours(twin.forward)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(twin.parameters(), layer.parameters()))


def test_compiled_layers(family):
    torch.compiler.reset()  # all families in one process are more than it compiles one function for
    model = build(family)
    with torch.no_grad():
        calls = recorded(model, inputs(family))
        vitkern.patch(model)
        path, layer = list(layers_of(model).items())[-1]
        expected, found = (
            run(*calls[path][0], **calls[path][1])[0]
            for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_compiled_model():
    model, given = build("deformable_detr"), inputs("deformable_detr")
    with torch.no_grad():
        expected = tensors(model(**given))
        vitkern.patch(model)
        found = tensors(torch.compile(model, backend="aot_eager")(**given))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["deformable_detr", "d_fine", "mask2former"])
def test_layers_in_bfloat16(name):
    """The error of the patched layer in bfloat16, against float64, is at most twice that of the original."""
    model, given = build(name), inputs(name)
    with torch.no_grad():
        calls = recorded(model, given)
    for path, layer in layers_of(model).items():
        with torch.no_grad():
            exact = called(copy.deepcopy(layer).double(), calls[path], torch.float64)
            low = copy.deepcopy(layer).bfloat16()
            theirs = called(low, calls[path], torch.bfloat16)
            vitkern.patch(low)
            ours = called(low, calls[path], torch.bfloat16)
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def called(layer, call, dtype):
    positional, named = call
    named = {
        key: each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for key, each in named.items()
    }
    return layer(*(each.to(dtype) for each in positional), **named)[0]


def test_doctor_reads_a_config(tmp_path, capsys):
    model = build("mask2former")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 0
    assert "decoder.encoder.layers.*.self_attn" in capsys.readouterr().out


LATER = """
import tests.ecosystem.conftest
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
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)


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
        with pytest.raises(
            RuntimeError,
            match=r"DeformableDetrMultiscale.*its forward takes hidden_states.*Nothing was patched",
        ):
            vitkern.patch(target)
    assert not vitkern.unpatch(model) and not vitkern.unpatch("transformers")
