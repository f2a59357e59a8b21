# SPDX-License-Identifier: Apache-2.0
"""adapter_bottleneck, token_pool and token_project in standard ONNX operators.

The second outputs of the first two are for backward only: an exported model leaves them unused, and the exporter drops
their nodes.
"""

from __future__ import annotations

import math

from vitkern.onnx.graph import FLOAT, Graph, Value, refuse


def adapter_bottleneck(
    graph: Graph,
    x: Value,
    down_weight: Value,
    down_bias: Value | None,
    up_weight: Value,
    up_bias: Value | None,
    residual: Value | None,
    scale: Value | None,
    seed: Value | None,
    factor: float = 1.0,
    dropout_p: float = 0.0,
    activation: str = "relu",
    residual_is_x: bool = False,
    keep: bool = False,
    backend: str | None = None,
) -> tuple[Value, Value]:
    if seed is not None:
        refuse(
            "adapter_bottleneck", f"training=True drops with dropout_p={dropout_p}; call model.eval() first"
        )
    dtype = graph.dtype(x)

    def alike(tensor: Value) -> Value:
        return tensor if graph.dtype(tensor) == dtype else graph.Cast(tensor, to=dtype)

    def linear(inputs: Value, weight: Value, bias: Value | None) -> Value:
        product = graph.MatMul(inputs, graph.Transpose(alike(weight), perm=[1, 0]))
        return product if bias is None else graph.Add(product, alike(bias))

    hidden = linear(x, down_weight, down_bias)
    output = linear(_activated(graph, activation, hidden, dtype), up_weight, up_bias)
    if scale is not None:
        output = graph.Mul(output, graph.Reshape(alike(scale), [1]))
    if factor != 1.0:
        output = graph.Mul(output, graph.constant(factor, dtype))
    added = x if residual_is_x else residual
    if added is not None:
        output = graph.Add(added, output)

    width = graph.sizes(down_weight)[0]
    kept = graph.Cast(graph.Reshape(hidden, [-1, width]), to=FLOAT)
    if not keep:
        kept = graph.Slice(kept, [0], [0], [0])
    return output, kept


def token_pool(graph: Graph, x: Value, weight: Value, backend: str | None = None) -> tuple[Value, Value]:
    dtype = graph.dtype(x)
    weight = weight if graph.dtype(weight) == dtype else graph.Cast(weight, to=dtype)
    logits = graph.MatMul(weight, graph.Transpose(x, perm=[0, 2, 1]))  # [B, T, N]
    tokens = graph.MatMul(graph.Softmax(logits, axis=-1), x)
    return tokens, graph.Log(graph.ReduceSum(graph.Exp(graph.Cast(logits, to=FLOAT)), [2], keepdims=0))


def token_project(
    graph: Graph, x: Value, query: Value, key: Value, tokens: Value, backend: str | None = None
) -> Value:
    logits = graph.MatMul(query, graph.Transpose(key, perm=[0, 2, 1]))  # [B, N, T]
    return graph.Add(x, graph.MatMul(graph.Softmax(logits, axis=-1), tokens))


def _activated(graph: Graph, activation: str, hidden: Value, dtype: int) -> Value:
    if activation == "relu":
        return graph.Relu(hidden)
    if activation == "silu":
        return graph.Mul(hidden, graph.Sigmoid(hidden))
    # Exact gelu in parts: operator Gelu needs opset 20.
    half, one, root = (graph.constant(number, dtype) for number in (0.5, 1.0, math.sqrt(0.5)))
    share = graph.Mul(graph.Add(graph.Erf(graph.Mul(hidden, root)), one), half)
    return graph.Mul(hidden, share)
