# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn against recorded outputs of ViT-Adapter's own module (czczup/ViT-Adapter at fd64a51).

``va_msda.pt`` holds, for the form of the injector and of the extractor, the module's initial weights, key-seeded
weights, inputs and output, and the reference points and level tables that ViT-Adapter makes for a 64 x 96 image.
"""

from pathlib import Path

import pytest
import torch

from vitkern.nn import MSDeformAttn

RECORDED = torch.load(Path(__file__).parent / "va_msda.pt", weights_only=True)
FORMS = {"inj": "deform_inputs1", "ext": "deform_inputs2"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_output_of_the_official_module(form, backend):
    recorded = RECORDED[form]
    reference_points, spatial_shapes, level_start_index = RECORDED[FORMS[form]]
    module = MSDeformAttn(**recorded["kw"], backend=backend)
    module.load_state_dict(recorded["sd"], strict=True)
    output = module(recorded["q"], reference_points, recorded["f"], spatial_shapes, level_start_index)
    torch.testing.assert_close(output, recorded["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_initial_weights_of_the_official_module(form):
    module = MSDeformAttn(**RECORDED[form]["kw"])
    recorded = RECORDED[form + "_init"]
    weights = module.state_dict()
    assert list(weights) == list(recorded)
    for key, initial in recorded.items():
        assert weights[key].shape == initial.shape
        if key in ("value_proj.weight", "output_proj.weight"):  # drawn at random: xavier_uniform's bound
            bound = (6 / sum(initial.shape)) ** 0.5
            for tensor in (weights[key], initial):
                assert 0.99 * bound < tensor.abs().max() <= bound
        else:
            assert torch.equal(weights[key], initial), key


def test_the_random_initial_weights_are_drawn_in_the_official_order():
    """Four Linear layers in the order of the state dict, then xavier_uniform on the two projections."""
    torch.manual_seed(7)
    module = MSDeformAttn(64, 2, 4, 3)
    torch.manual_seed(7)
    layers = [torch.nn.Linear(64, width) for width in (48, 24, 64, 64)]
    for layer in layers[2:]:
        torch.nn.init.xavier_uniform_(layer.weight)
    assert torch.equal(module.value_proj.weight, layers[2].weight)
    assert torch.equal(module.output_proj.weight, layers[3].weight)
