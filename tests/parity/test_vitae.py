# SPDX-License-Identifier: Apache-2.0
"""ViTAE and ViTAEv2 against recorded outputs of the official models (ViTAE-Transformer/ViTAE-Transformer at aebf1d7).

Each file holds an image, the model's output in eval mode and the gradients of a weighted sum of it. Weights depend
only on their key and shape.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

import vitkern
from tests.parity.weights import fill, seeded

FOLDER = Path(__file__).parent
NAMES = pytest.mark.parametrize("name", ["vitae_tiny", "vitaev2_s"])


@cache
def recorded(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def model(name):
    sizes = {option: recorded(name)[option] for option in ("img_size", "num_classes")}
    return fill(vitkern.create_model(name, **sizes)).eval()


@NAMES
def test_keys_in_their_order_shapes_and_numbers_of_parameters(name):
    made, expected = model(name), recorded(name)
    shapes = [(key, tuple(tensor.shape)) for key, tensor in made.state_dict().items()]
    assert shapes == [(key, tuple(shape)) for key, shape in expected["shapes"].items()]
    assert sum(parameter.numel() for parameter in made.parameters()) == expected["n_params"]
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == expected["n_trainable"]


@NAMES
def test_output_loss_and_gradients(name):
    made, expected = model(name), recorded(name)
    output = made(expected["input"])
    torch.testing.assert_close(output, expected["out_eval"], atol=1e-4, rtol=1e-4)
    loss = (output * seeded("g", output.shape)).sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"], atol=1e-3, rtol=1e-4)
    gradients = {key: p.grad.norm().item() for key, p in made.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected["grad_norms"].keys()
    for key, norm in expected["grad_norms"].items():
        assert abs(gradients[key] - norm) <= 1e-3 * norm + 1e-4, key
    assert [key for key, p in made.named_parameters() if p.grad is None] == expected["no_grad"]
