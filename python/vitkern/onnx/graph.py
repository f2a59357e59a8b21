# SPDX-License-Identifier: Apache-2.0
"""The interface for the translations of this package's ops: adds nodes through either exporter.

``graph.GridSample(x, grid, mode="nearest")`` adds a node and returns its output. Whole numbers and lists of them among
the inputs become constants. Dtypes are ONNX's own codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

FLOAT, INT32, INT64, DOUBLE = 1, 6, 7, 11  # of onnx.TensorProto
_TORCH_DTYPES = {FLOAT: torch.float32, INT64: torch.int64, DOUBLE: torch.float64}

Value = Any  # an exporter's representation of a tensor

# ONNX Runtime's TensorRT provider finds plugins in this domain; TensorRT's own parser takes any domain.
PLUGIN_DOMAIN = "trt.plugins"
PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"


def refuse(op: str, why: str) -> NoReturn:
    raise ValueError(f"vitkern.{op} cannot be exported: {why}")


class Graph:
    """Adds nodes to the graph that an exporter builds."""

    bilinear = "bilinear"  # GridSample's name of the mode up to opset 19

    def __getattr__(self, op: str) -> Callable[..., Value]:
        raise NotImplementedError

    def constant(self, numbers: float | Sequence[Any], dtype: int) -> Value:
        raise NotImplementedError

    def sizes(self, value: Value) -> list[int | None]:
        """The shape of an argument of the op; None for a dynamic axis."""
        raise NotImplementedError

    def dtype(self, value: Value) -> int:
        """The dtype of an argument of the op."""
        raise NotImplementedError

    def plugin(self, version: str, *inputs: Value) -> Value:
        """Adds a node of TensorRT's plugin, which has five inputs."""
        raise NotImplementedError


class ScriptGraph(Graph):
    """The graph of the torch.export exporter, by onnxscript."""

    def __init__(self) -> None:
        # Torch's own translations are written in this opset; the exporter converts to the requested one.
        from onnxscript import opset18

        self._opset = opset18

    def __getattr__(self, op: str) -> Callable[..., Value]:
        return getattr(self._opset, op)

    def constant(self, numbers: float | Sequence[Any], dtype: int) -> Value:
        from onnxscript import ir

        return self._opset.Constant(value=ir.tensor(numbers, ir.DataType(dtype)))

    def sizes(self, value: Value) -> list[int | None]:
        return [size if isinstance(size, int) else None for size in value.shape]

    def dtype(self, value: Value) -> int:
        return int(value.dtype)

    def plugin(self, version: str, *inputs: Value) -> Value:
        from onnx.defs import OpSchema
        from onnxscript.values import Op, Opset

        floats, whole = ["tensor(float)", "tensor(float16)"], ["tensor(int32)"]
        names = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
        kinds = ("T", "I", "I", "T", "T")
        schema = OpSchema(
            PLUGIN,
            PLUGIN_DOMAIN,
            1,
            inputs=[OpSchema.FormalParameter(name, kind) for name, kind in zip(names, kinds)],
            outputs=[OpSchema.FormalParameter("output", "T")],
            type_constraints=[("T", floats, ""), ("I", whole, "")],
            attributes=[
                OpSchema.Attribute(name, OpSchema.AttrType.STRING)
                for name in ("plugin_version", "plugin_namespace")
            ],
        )
        node = Op(Opset(PLUGIN_DOMAIN, 1), PLUGIN, schema)
        return node(*inputs, plugin_version=version, plugin_namespace="")


class LegacyGraph(Graph):
    """The graph of the TorchScript exporter."""

    def __init__(self, context: Any, bilinear: str, arguments: Sequence[Value]) -> None:
        self._context, self.bilinear = context, bilinear
        # The traced value has all sizes; the exporter's own shape inference loses some.
        traced = context.original_node.inputs()
        self._traced = {id(argument): value for argument, value in zip(arguments, traced)}

    def __getattr__(self, op: str) -> Callable[..., Value]:
        def add(*inputs: Value, **attributes: Any) -> Value:
            suffixes = {int: "i", str: "s", list: "i"}
            named = {f"{name}_{suffixes[type(value)]}": value for name, value in attributes.items()}
            inputs = tuple(self.constant(i, INT64) if isinstance(i, (int, list)) else i for i in inputs)
            return self._context.op(op, *inputs, **named)

        return add

    def constant(self, numbers: float | Sequence[Any], dtype: int) -> Value:
        return self._context.op("Constant", value_t=torch.tensor(numbers, dtype=_TORCH_DTYPES[dtype]))

    def sizes(self, value: Value) -> list[int | None]:
        sizes = list(self._traced[id(value)].type().varyingSizes())
        # A trace does not record whether batch and queries are dynamic.
        return [None, None, *sizes[2:]] if len(sizes) > 3 else sizes

    def dtype(self, value: Value) -> int:
        from torch.onnx import JitScalarType

        return int(JitScalarType.from_value(value).onnx_type().value)

    def plugin(self, version: str, *inputs: Value) -> Value:
        attributes = {"plugin_version_s": version, "plugin_namespace_s": ""}
        output = self._context.op(f"{PLUGIN_DOMAIN}::{PLUGIN}", *inputs, **attributes)
        output.setType(inputs[0].type().with_sizes([None] * 4))
        return output
