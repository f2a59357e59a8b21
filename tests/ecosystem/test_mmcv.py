# SPDX-License-Identifier: Apache-2.0
"""mmcv-lite with vitkern.install("mmcv"): its layer on our kernels agrees with the unchanged layer.

With a checkout of https://github.com/open-mmlab/mmcv in VITKERN_MMCV, its own test of the op runs too, on the CPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitkern
from vitkern.compat import forms, layers
from vitkern.compat import mmcv as ours

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")

SHAPES = torch.tensor([[12, 17], [6, 9], [3, 5], [2, 3]])
STARTS = torch.tensor([0, 204, 258, 273])
PIXELS, QUERIES, IMAGES, CHANNELS = 279, 50, 3, 64
PLUGIN = "tests.ecosystem.cuda_is_cpu"


def build(**options):
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    settings = dict(type="MultiScaleDeformableAttention", embed_dims=CHANNELS, dropout=0.0)
    return MODELS.build({**settings, **options})


def run(layer, first, reference=2):
    """The result, and gradients of all inputs and parameters."""
    torch.manual_seed(1)
    query, position, value = (torch.randn(IMAGES, count, CHANNELS) for count in (QUERIES, QUERIES, PIXELS))
    points = torch.rand(IMAGES, QUERIES, len(SHAPES), reference)
    mask = torch.rand(IMAGES, PIXELS) > 0.8
    if not first:
        query, position, value = (tensor.transpose(0, 1) for tensor in (query, position, value))
    inputs = [tensor.clone().requires_grad_() for tensor in (query, value, position, points)]
    output = layer(
        inputs[0],
        value=inputs[1],
        query_pos=inputs[2],
        key_padding_mask=mask,
        reference_points=inputs[3],
        spatial_shapes=SHAPES,
        level_start_index=STARTS,
    )
    weights = torch.linspace(0, 1, output.numel()).view(output.shape)
    return output, *torch.autograd.grad((output * weights).sum(), [*inputs, *layer.parameters()])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reference", [2, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_layer_gives_what_it_gave(first, reference, ratio):
    from mmcv.ops import MultiScaleDeformableAttention

    layer = build(batch_first=first, value_proj_ratio=ratio)
    assert type(layer) is MultiScaleDeformableAttention
    assert forms.is_ours(MultiScaleDeformableAttention.forward)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    switched = run(layer, first, reference)
    vitkern.uninstall("mmcv")
    assert not forms.is_ours(MultiScaleDeformableAttention.forward)
    theirs = run(layer, first, reference)
    vitkern.install("mmcv")
    for a, b in zip(switched, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


def test_layer_of_ours_starts_and_computes_as_theirs():
    theirs = build(batch_first=True)
    torch.manual_seed(0)
    layer = ours.MultiScaleDeformableAttention(CHANNELS, dropout=0.0, batch_first=True)
    for (name, a), (other, b) in zip(layer.state_dict().items(), theirs.state_dict().items()):
        assert name == other and torch.equal(a, b)
    assert torch.equal(run(layer, True)[0], run(theirs, True)[0])


def test_function_of_theirs_runs_on_the_cpu():
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    value = torch.rand(2, PIXELS, 2, 4, dtype=torch.float64)
    locations, weights = torch.rand(2, 5, 2, 4, 3, 2).double(), torch.rand(2, 5, 2, 4, 3).double()
    results = []
    for through in (
        lambda v, x, w: MultiScaleDeformableAttnFunction.apply(v, SHAPES, STARTS, x, w, 64),
        lambda v, x, w: multi_scale_deformable_attn_pytorch(v, SHAPES, x, w),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        output = through(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_all_of_mmcv_imports_and_says_what_it_lacks():
    from mmcv.ops import get_compiler_version, nms

    assert "vitkern" in get_compiler_version()
    with pytest.raises(NotImplementedError, match="mmcv._ext.nms is not there"):
        nms(torch.rand(3, 4), torch.rand(3), 0.5)


def test_a_detector_trains_on_the_kernels():
    """Every such layer of mmdet's Deformable-DETR, with one and the same class for isinstance."""
    transformer = pytest.importorskip("mmdet.models.layers.transformer")
    options = dict(
        self_attn_cfg=dict(embed_dims=CHANNELS, num_levels=4, dropout=0.0, batch_first=True),
        ffn_cfg=dict(embed_dims=CHANNELS, feedforward_channels=64),
    )
    encoder = transformer.DeformableDetrTransformerEncoder(num_layers=1, layer_cfg=options)
    features = torch.randn(2, PIXELS, CHANNELS, requires_grad=True)
    inputs = dict(
        query=features,
        query_pos=torch.randn_like(features),
        key_padding_mask=torch.zeros(2, PIXELS, dtype=torch.bool),
        spatial_shapes=SHAPES,
        level_start_index=STARTS,
        valid_ratios=torch.ones(2, 4, 2),
    )
    encoder(**inputs)  # the first call tries the layer
    calls = []
    kernel = layers.ms_deform_attn_fused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "ms_deform_attn_fused", lambda *a: calls.append(1) or kernel(*a))
        output = encoder(**inputs)
    output.sum().backward()
    assert len(calls) == 1 and features.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(
    "VITKERN_MMCV" not in os.environ,
    reason="VITKERN_MMCV names no checkout of mmcv, whose releases lack its tests",
)
def test_its_own_test(tmp_path):
    """The file as it is, except that "cuda" is the CPU: cuda_is_cpu.py. 21 of its tests run in 2.1, 2.2 and later."""
    file = Path(os.environ["VITKERN_MMCV"]) / "tests" / "test_ops" / "test_ms_deformable_attn.py"
    options = ["-rs", "--no-header", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "vitkern", "run", "-m", "pytest", *options, "-p", PLUGIN, str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", lines[-1])
    assert passed is not None and int(passed[1]) >= 21, lines[-1]
    reasons = {line.rpartition(": ")[2] for line in lines if line.startswith("SKIPPED")}
    known = r"requires (MLU|MUSA|NPU) support|its Jacobian of 1025 channels takes 14 GB"
    assert all(re.fullmatch(known, reason) for reason in reasons), reasons
