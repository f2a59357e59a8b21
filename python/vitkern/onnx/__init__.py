# SPDX-License-Identifier: Apache-2.0
"""ONNX: this package's ops as standard operators or as TensorRT's plugin, for both of torch's exporters.

>>> torch.onnx.export(model, args, dynamo=True, custom_translation_table=vitkern.onnx.translation_table())
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from vitkern.onnx import dense
from vitkern.onnx import ms_deform_attn as attention
from vitkern.onnx.graph import Graph, LegacyGraph, ScriptGraph, Value

__all__ = ["register_legacy", "translation_table"]

# Called with a graph and the op's arguments.
_Translation = Callable[..., Any]

_FORMS = ("standard", "tensorrt")
_FIRST_OPSET = 16  # the first opset with GridSample
_RENAMED = 20  # the opset that renames its mode "bilinear" to "linear"


def translation_table(
    *, ms_deform_attn: str = "standard", plugin_version: str = "1"
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` for ``torch.onnx.export(..., dynamo=True)``.

    Args:
        ms_deform_attn: ``"standard"``: multi-scale deformable attention in operators of opset 16, one GridSample a
            level; ``"tensorrt"``: one node of TensorRT's plugin MultiscaleDeformableAttnPlugin_TRT.
        plugin_version: version of the plugin. ``"1"`` and ``"2"`` have the same inputs and outputs.

    Needs onnx and onnxscript: ``pip install onnx onnxscript``.
    """
    for module in ("onnx", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"vitkern.onnx.translation_table needs {module}: pip install onnx onnxscript")
    graph = ScriptGraph()
    table = {}
    for op, translation in _translations(ms_deform_attn, plugin_version).items():

        def translate(*arguments: Any, _translation: _Translation = translation, **options: Any) -> Any:
            return _translation(graph, *arguments, **options)

        # The exporter takes the argument names from the signature.
        parameters = list(inspect.signature(translation).parameters.values())[1:]
        translate.__name__, translate.__annotations__ = op, {}
        translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        table[getattr(torch.ops.vitkern, op).default] = translate
    return table


def register_legacy(*, ms_deform_attn: str = "standard", plugin_version: str = "1") -> None:
    """Registers this package's ops with the TorchScript exporter, ``torch.onnx.export(..., dynamo=False)``.

    Arguments are those of :func:`translation_table`; an earlier registration is replaced. TensorRT's plugin also needs
    the exporter's argument ``custom_opsets={"trt.plugins": 1}``.
    """
    for op, translation in _translations(ms_deform_attn, plugin_version).items():
        for opset, bilinear in ((_FIRST_OPSET, "bilinear"), (_RENAMED, "linear")):
            symbolic = _symbolic(op, translation, bilinear)
            torch.onnx.register_custom_op_symbolic(f"vitkern::{op}", symbolic, opset)


def _translations(form: str, plugin_version: str) -> dict[str, _Translation]:
    if form not in _FORMS:
        raise ValueError(f"ms_deform_attn must be one of {_FORMS}, got {form!r}")

    def sampled(describe: _Translation) -> _Translation:
        def translate(graph: Graph, *arguments: Any, **options: Any) -> Value:
            sampling = describe(graph, *arguments, **options)
            if form == "tensorrt":
                return attention.by_tensorrt(graph, sampling, plugin_version)
            return attention.by_grid_sample(graph, sampling)

        translate.__signature__ = inspect.signature(describe)  # type: ignore[attr-defined]
        return translate

    return {
        "ms_deform_attn": sampled(attention.ms_deform_attn),
        "ms_deform_attn_fused": sampled(attention.ms_deform_attn_fused),
        "adapter_bottleneck": dense.adapter_bottleneck,
        "token_pool": dense.token_pool,
        "token_project": dense.token_project,
    }


def _symbolic(op: str, translation: _Translation, bilinear: str) -> _Translation:
    from torch.onnx import symbolic_helper

    descriptors: dict[str, Any] = {"Tensor": "v", "List[int]": "is", "float": "f", "bool": "b", "str": "s"}
    schema = getattr(torch.ops.vitkern, op).default._schema
    types = [str(argument.type).removeprefix("Optional[") for argument in schema.arguments]
    kinds = [descriptors[kind if kind in descriptors else kind.removesuffix("]")] for kind in types]

    def symbolic(context: Any, *arguments: Any) -> Any:
        plain = [
            None if a.node().mustBeNone() else symbolic_helper._parse_arg(a, kind)
            for a, kind in zip(arguments, kinds)
        ]
        return translation(LegacyGraph(context, bilinear, arguments), *plain)

    return symbolic
