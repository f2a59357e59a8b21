# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer against recorded outputs of the official models (ShoufaChen/AdaptFormer at 6967d67).

Each file holds the tuning configuration, an input, the model's output in eval mode and the gradients of a weighted
sum of the outputs. Weights depend only on their key and shape.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.weights import fill, seeded
from vitkern.models import AdaptFormer, AdaptFormerVideo

FOLDER = Path(__file__).parent
COMMON = dict(patch_size=16, embed_dim=192, depth=4, num_heads=3, mlp_ratio=4, qkv_bias=True, num_classes=10)
MODELS = {
    "af_img_parallel": (AdaptFormer, dict(img_size=64)),
    "af_vid_parallel": (AdaptFormerVideo, dict(img_size=32, all_frames=8, tubelet_size=2)),
}
NAMES = pytest.mark.parametrize("name", MODELS)


@cache
def recorded(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def model(name, backend=None):
    (kind, options), expected = MODELS[name], recorded(name)
    made = kind(tuning_config=expected["cfg"], backend=backend, **COMMON, **options, **expected["kw"])
    return fill(made).eval()


@NAMES
def test_keys_in_their_order_shapes_and_number_of_parameters(name):
    made = model(name)
    assert [(key, tuple(tensor.shape)) for key, tensor in made.state_dict().items()] == [
        (key, tuple(shape)) for key, shape in recorded(name)["shapes"].items()
    ]
    assert sum(parameter.numel() for parameter in made.parameters()) == recorded(name)["n_params"]


@NAMES
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_outputs_loss_and_gradients(name, backend):
    made, expected = model(name, backend), recorded(name)
    output = made(expected["input"])
    torch.testing.assert_close(output.detach(), expected["out_eval"], atol=1e-4, rtol=1e-4)
    loss = (output * seeded("g", output.shape)).sum()
    torch.testing.assert_close(loss.detach(), expected["loss"], atol=1e-3, rtol=1e-4)
    loss.backward()
    for key, parameter in made.named_parameters():
        norm = expected["grad_norms"][key]
        assert abs(parameter.grad.norm().item() - norm) <= 1e-3 * norm + 1e-4, key
