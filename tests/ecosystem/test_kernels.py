# SPDX-License-Identifier: Apache-2.0
"""vitkern.compat.kernels: a real Deformable-DETR runs our layer where kernels are asked for, and only there."""

import copy

import pytest
import torch

kernels = pytest.importorskip("kernels", reason="needs kernels: make test-kernels")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-kernels")

from vitkern.compat import kernels as ours  # noqa: E402

IMAGE = (2, 3, 64, 96)


@pytest.fixture
def calls(monkeypatch):
    """A list with one entry for each call of our layer."""
    made = []

    def counted(*arguments):
        made.append(arguments)
        return attend(*arguments)

    attend = ours.ms_deform_attn
    monkeypatch.setattr(ours, "ms_deform_attn", counted)
    return made


@pytest.fixture
def registered():
    ours.register()
    yield
    ours.unregister()


@pytest.fixture(scope="module")
def detector():
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        num_labels=5,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    torch.manual_seed(0)
    model = transformers.DeformableDetrForObjectDetection(config)
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name:  # as they begin, encoders sample where a pixel ends and another begins
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs_and_gradients(model):
    torch.manual_seed(1)
    outputs = model(torch.randn(IMAGE))
    results = outputs.logits, outputs.pred_boxes
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(sum(r.square().sum() for r in results), parameters, allow_unused=True)
    return results, gradients


def assert_same(model, expected_of):
    results, gradients = outputs_and_gradients(model)
    expected, expected_gradients = outputs_and_gradients(expected_of)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert (actual is None) == (gradient is None)
        if gradient is not None:
            largest = gradient.abs().max().item()
            torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-3 * largest + 1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_use_kernels_runs_our_layer(training, detector, calls, registered):
    model = copy.deepcopy(detector).train(training)
    model.set_use_kernels(True)
    assert_same(model, detector.train(training))
    assert len(calls) == 4  # two layers of the encoder, two of the decoder


def test_a_model_loaded_with_use_kernels(detector, calls, registered, tmp_path):
    detector.eval().save_pretrained(tmp_path)
    model = type(detector).from_pretrained(tmp_path, use_kernels=True)
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.ones(IMAGE)).logits, detector(torch.ones(IMAGE)).logits, rtol=1e-4, atol=1e-4
        )
    assert len(calls) == 4


def test_a_mapping_for_a_while(detector, calls):
    model = copy.deepcopy(detector)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(ours.mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NO_LAYER)
    assert_same(model, detector)
    assert len(calls) == 4


def test_no_trace_without_register(detector, calls):
    model = copy.deepcopy(detector).eval()
    model.set_use_kernels(True)
    model(torch.ones(IMAGE))
    assert not calls


def test_register_is_undone(detector, calls):
    from transformers.integrations import hub_kernels

    defaults = hub_kernels.get_kernel_mapping_transformers()
    before = dict(defaults[ours.NAME])
    ours.register()
    ours.register()
    assert set(defaults[ours.NAME]) == {"cpu", "cuda"}
    assert all(isinstance(place, ours.Repository) for place in defaults[ours.NAME].values())
    ours.unregister()
    ours.unregister()
    assert defaults[ours.NAME] == before
    model = copy.deepcopy(detector).eval()
    model.set_use_kernels(True)
    model(torch.ones(IMAGE))
    assert not calls


def test_on_a_gpu_transformers_own_default_gives_way(registered):
    """The library's defaults, registered again, do not restore the layer from the hub."""
    from transformers.integrations import hub_kernels

    hub_kernels.register_kernel_mapping_transformers()
    from kernels.layer.globals import _KERNEL_MAPPING

    for_cuda = _KERNEL_MAPPING.get()[ours.NAME]["cuda"].repos_by_capability
    assert for_cuda.find_smallest_interval(90) == {kernels.Mode.FALLBACK: ours.Repository()}
