# SPDX-License-Identifier: Apache-2.0
"""Models to export to ONNX, torch's present exporter, and a runtime for its files. Skips tests if onnx is missing."""

from collections import Counter

import pytest
import torch
from torch import nn

import vitkern
from vitkern.nn import MSDeformAttn

onnx = pytest.importorskip("onnx", reason="needs onnx: make test-ecosystem")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-ecosystem")
pytest.importorskip("onnxscript", reason="needs onnxscript: make test-ecosystem")

import vitkern.onnx  # noqa: E402

SIZES = [(6, 5), (3, 2), (7, 3), (1, 1), (2, 9)]  # odd, and one of a single pixel
HEADS, CHANNELS = 2, 8


class Call(nn.Module):
    """A function of tensors, with its other arguments."""

    def __init__(self, function, *fixed, **options):
        super().__init__()
        self.function, self.fixed, self.options = function, fixed, options

    def forward(self, *tensors):
        return self.function(*tensors, *self.fixed, **self.options)


class Layer(nn.Module):
    """MSDeformAttn on levels of fixed sizes, with weights like those of a trained layer."""

    def __init__(self, levels):
        super().__init__()
        self.sizes = SIZES[:levels]
        self.attention = MSDeformAttn(HEADS * CHANNELS, levels, HEADS, 3)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.3)
        nn.init.normal_(self.attention.attention_weights.weight, std=0.3)

    def forward(self, query, reference_points, pixels):
        return self.attention(query, reference_points, pixels, self.sizes)

    def inputs(self, batch, queries, numbers=2):
        levels, channels = len(self.sizes), HEADS * CHANNELS
        query, points = torch.randn(batch, queries, channels), torch.rand(batch, queries, levels, numbers)
        return query, points, torch.randn(batch, pixels_of(self.sizes), channels)


def pixels_of(sizes):
    return sum(height * width for height, width in sizes)


def export(model, inputs, path, dynamic=None, table=None, **options):
    """Exports with torch's present exporter, checks the file with shape inference and returns the nodes by operator."""
    table = vitkern.onnx.translation_table() if table is None else table
    program = torch.onnx.export(
        model,
        inputs,
        dynamo=True,
        dynamic_shapes=dynamic,
        custom_translation_table=table,
        verbose=False,
        **options,
    )
    program.save(path)
    return checked(path)


def checked(path):
    onnx.checker.check_model(str(path), full_check=True)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path, inputs):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs)}
    return [torch.from_numpy(output) for output in session.run(None, feeds)]


def assert_same(model, path, inputs, rtol=1e-4, atol=1e-4):
    with torch.no_grad():
        expected = model(*inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    for actual, tensor in zip(run(path, inputs), expected, strict=True):
        torch.testing.assert_close(actual, tensor, rtol=rtol, atol=atol)


def attention_inputs(
    fused, batch=2, queries=5, points=(3, 3), flat=False, numbers=2, shared=(), dtype=torch.float32
):
    """Inputs of an op: value, then locations and weights, or reference points, offsets and logits."""
    levels, total = len(points), sum(points)
    value = torch.randn(batch, pixels_of(SIZES[:levels]), HEADS, CHANNELS, dtype=dtype)
    shape = (batch, queries, HEADS, *((total,) if flat else (levels, points[0])))
    if not fused:
        return value, torch.rand(*shape, 2) * 1.6 - 0.3, torch.rand(shape)
    reference = torch.rand(
        1 if "batch" in shared else batch, queries, 1 if "level" in shared else levels, numbers
    )
    return value, reference, torch.randn(*shape, 2), torch.randn(batch, queries, HEADS, total)


def plain(value, locations, weights, sizes=SIZES[:2], **options):
    return vitkern.ms_deform_attn(value, sizes, None, locations, weights, **options)


def fused(value, reference, offsets, logits, sizes=SIZES[:2], **options):
    return vitkern.ms_deform_attn_fused(value, sizes, None, reference, offsets, logits, **options)


UNEQUAL = dict(points=(4, 0, 2), flat=True)
