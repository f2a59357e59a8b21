# SPDX-License-Identifier: Apache-2.0
"""How the layer of multi-scale deformable attention is recognised in the code of other projects.

By what the code of its forward says, not by where it comes from: the layer has been copied into dozens of repositories.
All that the code names has to be known, so that a copy which does something more, or less, stays what it is.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from vitkern.compat import layers

Function = Callable[..., Any]
Words = frozenset[str]


def _words(text: str) -> Words:
    return frozenset(text.split())


# What a forward of any form names: its layers, ...
_PARTS = _words("sampling_offsets attention_weights masked_fill softmax")
_PROJECTED = _PARTS | _words("value_proj output_proj")
# ... and what it may name: torch and builtins, and sizes that can be told from the weights.
_COMMON = _words(
    "F ValueError apply cuda d_model device dtype flatten flip float float16 float32 format functional half "
    "im2col_step int is_available is_cuda is_torchdynamo_compiling long nn permute ratio reshape shape stack sum "
    "tensor to torch torch_compilable_check type unsqueeze view with_pos_embed"
)
_MMCV = _words(
    "IS_CUDA_AVAILABLE IS_MLU_AVAILABLE IS_MUSA_AVAILABLE IS_NPU_AVAILABLE is_mlu is_musa "
    "multi_scale_deformable_attn_pytorch"
)
_CORE = _words(
    "append arange clamp concat contiguous device enumerate flatten functional grid_sample int64 nn permute repeat "
    "reshape shape split stack sum tensor to torch transpose unsqueeze view"
)
_TRANSFORMERS_ARGUMENTS = _words(
    "self hidden_states attention_mask encoder_hidden_states encoder_attention_mask position_embeddings "
    "reference_points spatial_shapes spatial_shapes_list level_start_index output_attentions kwargs"
)
_DEFORMABLE_DETR_ARGUMENTS = _words(
    "self query reference_points input_flatten input_spatial_shapes input_level_start_index input_padding_mask"
)
_MMCV_ARGUMENTS = _words(
    "self query key value identity query_pos key_padding_mask reference_points spatial_shapes level_start_index kwargs"
)


# Where the decorators are defined that do no more than that.
_WRAPPERS = {__name__, "mmcv.utils.misc", "mmengine.utils.misc", "transformers.utils.deprecation"}


class Form(NamedTuple):
    """One way in which projects write the layer, or its core."""

    forward: Function  # that takes the place of theirs: of the layer, and their arguments by name
    kernel: str  # which function of this package it calls
    arguments: Words  # that their forward may take
    words: Words  # that its code must use
    may: Words  # that it may use besides
    inverts: bool = False  # whether it inverts the mask, in which True is then a valid pixel
    core: str | None = None  # where its core is found: an attribute of the layer, or a global of its module

    def objection(self, function: Function) -> str | None:
        """None if the function is a forward of this form, else how it differs."""
        arguments, words, inverts = read(function)
        wrapper = unwrapped(function)
        if hasattr(wrapper, "__wrapped__"):
            where = getattr(wrapper, "__globals__", {}).get("__name__", type(wrapper).__name__)
            return f"its forward is wrapped, by what is defined in {where}"
        if missing := self.words - words:
            return f"its forward does not use {_listed(missing)}"
        if unknown := (words - self.words - self.may) | (arguments - self.arguments):
            return f"its forward uses {_listed(unknown)}, which is not known here"
        return "its forward takes a mask of another meaning" if inverts != self.inverts else None

    def objection_to_core(self, module: nn.Module, function: Function) -> str | None:
        """None unless the layer calls a core that is not the one it was written with."""
        if self.core is None:
            return None
        found = getattr(module, self.core, None) or unwrapped(function).__globals__.get(self.core)
        called = type(found).forward if isinstance(found, nn.Module) else found
        if (isinstance(found, nn.Module) and "forward" in vars(found)) or not is_core(called):
            return f"its {self.core} is not the original one"
        return None


def _listed(names: Words) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def read(function: Function) -> tuple[Words, Words, bool]:
    """The arguments of a function, all names that its code uses, and whether it inverts anything."""
    code = getattr(unwrapped(function), "__code__", None)
    if code is None:
        return frozenset(), frozenset(), False
    arguments = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    inverts = any(instruction.opname == "UNARY_INVERT" for instruction in dis.get_instructions(code))
    return frozenset(code.co_varnames[:arguments]), frozenset(_names(code)), inverts


def unwrapped(function: Function) -> Any:
    """A forward without what warns of deprecated arguments, or with which it was replaced. Others may do anything."""

    def stops(wrapper: Any) -> bool:
        return getattr(wrapper, "__globals__", {}).get("__name__") not in _WRAPPERS

    return inspect.unwrap(function, stop=stops)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def is_core(function: Function | None) -> bool:
    """Whether this samples as transformers does: by grid_sample, or replaced already."""
    if function is None or is_ours(function):
        return function is not None
    words = read(function)[1]
    return "grid_sample" in words and words <= _CORE


def is_ours(function: Function) -> bool:
    return hasattr(function, "replaces")


def replacing(original: Function, replacement: Function) -> Function:
    """The replacement, under the original's name and signature. Where it gives NotImplemented the original runs."""
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: nn.Module, *positional: Any, **named: Any) -> Any:
        if len(positional) <= len(names):
            output = replacement(self, **dict(zip(names, positional)), **named)
            if output is not NotImplemented:
                return output
        return original(self, *positional, **named)

    forward.replaces = original  # type: ignore[attr-defined]
    return forward


def is_such_a_layer(module: nn.Module) -> bool:
    """Whether a module of another project has what makes this layer, however its forward may be written."""
    if type(module).__module__.partition(".")[0] == "vitkern":
        return False
    own = {name for name, _ in module.named_children()}  # a wrapper may lend those of what it wraps
    return {"sampling_offsets", "attention_weights"} <= own


@functools.lru_cache(maxsize=1024)
def form_of(function: Function) -> Form | None:
    """The form that a forward is of."""
    return next((form for form in (*FORMS, CORE) if form.objection(function) is None), None)


def difference(function: Function) -> str:
    """How a forward that is of no form differs from the one that it is most like."""
    arguments, words, _ = read(function)
    nearest = max(FORMS, key=lambda form: (len(form.arguments & arguments), len(form.words & words)))
    return nearest.objection(function) or ""


_FUSED, _PLAIN = "ms_deform_attn_fused", "ms_deform_attn"
_N_SIZES, _NUM_SIZES = _words("n_heads n_levels n_points"), _words("num_heads num_levels num_points")
_V2 = _PARTS | _words("n_heads n_levels offset_scale")

FORMS = (
    Form(  # transformers: Deformable DETR and most others
        partial(layers.transformers, False),
        _FUSED,
        _TRANSFORMERS_ARGUMENTS,
        _PROJECTED | _N_SIZES | {"attn"},
        _COMMON,
        inverts=True,
        core="attn",
    ),
    Form(  # transformers: Mask2Former and OneFormer
        partial(layers.transformers, True),
        _FUSED,
        _TRANSFORMERS_ARGUMENTS,
        _PROJECTED | _N_SIZES | {"multi_scale_deformable_attention"},
        _COMMON,
        core="multi_scale_deformable_attention",
    ),
    Form(  # transformers: RT-DETR v2
        layers.transformers_v2,
        _PLAIN,
        _TRANSFORMERS_ARGUMENTS,
        _V2 | _PROJECTED | _words("multi_scale_deformable_attention_v2 method n_points_list n_points_scale"),
        _COMMON | {"n_points"},
        inverts=True,
        core="multi_scale_deformable_attention_v2",
    ),
    Form(  # transformers: D-FINE and DEIM v2
        layers.transformers_v2,
        _PLAIN,
        _TRANSFORMERS_ARGUMENTS,
        _V2 | _words("ms_deformable_attn_core decoder_method num_points_list num_points_scale"),
        _COMMON,
        inverts=True,
        core="ms_deformable_attn_core",
    ),
    Form(  # Deformable-DETR, DINO, Mask2Former, ViT-Adapter, each in its own repository
        layers.deformable_detr,
        _FUSED,
        _DEFORMABLE_DETR_ARGUMENTS,
        _PROJECTED | _N_SIZES | {"MSDeformAttnFunction"},
        _COMMON | {"ms_deform_attn_core_pytorch"},
    ),
    Form(  # mmcv and detrex
        partial(layers.mmcv, True),
        _FUSED,
        _MMCV_ARGUMENTS,
        _PROJECTED | _NUM_SIZES | _words("MultiScaleDeformableAttnFunction batch_first dropout"),
        _COMMON | _MMCV,
    ),
    Form(  # GroundingDINO in its own repository
        partial(layers.mmcv, False),
        _FUSED,
        _MMCV_ARGUMENTS - {"identity"},
        _PROJECTED | _NUM_SIZES | _words("MultiScaleDeformableAttnFunction batch_first"),
        _COMMON | _MMCV,
    ),
)

# The core of Deformable DETR and most others in transformers: a layer of its own, without weights.
CORE = Form(
    layers.core,
    _PLAIN,
    _words(
        "self value value_spatial_shapes value_spatial_shapes_list level_start_index sampling_locations "
        "attention_weights im2col_step"
    ),
    frozenset({"grid_sample"}),
    _CORE,
)
