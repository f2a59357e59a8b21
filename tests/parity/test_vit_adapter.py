# SPDX-License-Identifier: Apache-2.0
"""ViT-Adapter against recorded outputs of the official models (czczup/ViT-Adapter at fd64a51).

Each file holds the constructor's arguments, an input, the model's output in eval mode and, for two models, the
gradients of a weighted sum of the outputs. Weights depend only on their key and shape.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.weights import fill, seeded
from vitkern.models import BEiTAdapter, ViTAdapter

FOLDER = Path(__file__).parent
MODELS = {
    "va_seg_vit_tiny": (ViTAdapter, "segmentation"),
    "va_det_vit_tiny_win": (ViTAdapter, "detection"),
    "va_det_beit_tiny_new": (BEiTAdapter, "detection"),
}
NAMES = pytest.mark.parametrize("name", MODELS)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


@cache
def recorded(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def model(name, backend=None):
    kind, variant = MODELS[name]
    return fill(kind(variant=variant, backend=backend, **recorded(name)["cfg"])).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@NAMES
def test_keys_shapes_and_number_of_parameters(name):
    made = model(name)
    assert {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()} == {
        key: tuple(shape) for key, shape in recorded(name)["shapes"].items()
    }
    assert sum(parameter.numel() for parameter in made.parameters()) == recorded(name)["n_params"]


@NAMES
@BACKENDS
@torch.no_grad()
def test_outputs_and_what_the_parts_make(name, backend):
    made = model(name, backend)
    parts = {}
    made.spm.register_forward_hook(lambda module, inputs, output: parts.update(spm=output))
    for index, interaction in enumerate(made.interactions):
        interaction.register_forward_hook(
            lambda module, inputs, output, key=f"inter{index}": parts.update({key: output[:2]})
        )
    outputs = made(recorded(name)["input"])
    assert parts.keys() == recorded(name)["intermediate"].keys()
    for key, expected in recorded(name)["intermediate"].items():
        close(list(parts[key]), list(expected))
    close(outputs, list(recorded(name)["out_eval"]))


@pytest.mark.parametrize("name", ["va_seg_vit_tiny", "va_det_vit_tiny_win"])
@BACKENDS
def test_loss_and_gradients(name, backend):
    made, expected = model(name, backend), recorded(name)
    image = expected["input"].clone().requires_grad_()
    loss = sum((map_ * seeded(f"g{i}", map_.shape)).sum() for i, map_ in enumerate(made(image)))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"], atol=1e-2, rtol=1e-4)
    # Its values have a standard deviation of 7 and are sums over all that an image makes: 3e-6 of it measured.
    torch.testing.assert_close(image.grad, expected["grad_input"], atol=1e-3, rtol=1e-4)
    for key, parameter in made.named_parameters():
        norm = expected["grad_norms"][key]
        assert abs(parameter.grad.norm().item() - norm) <= 1e-3 * norm + 1e-4, key
