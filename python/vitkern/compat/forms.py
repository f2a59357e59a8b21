# SPDX-License-Identifier: Apache-2.0
"""The forms of multi-scale deformable attention in other projects: arguments, sizes, and replacements.

A form is a suggestion: names of arguments and attributes give their roles. The trial then decides whether the kernel
computes the same as the layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from vitkern.compat import layers
from vitkern.compat.trial.inputs import Sizes

Function = Callable[..., Any]
Channels = Mapping[str, int]  # that each child takes


class Form(NamedTuple):
    """One form of the layer, or of its core, in other projects."""

    name: str
    forward: Function  # the replacement, called with the layer and its arguments by name
    kernel: str  # the function of this package that it calls
    roles: Mapping[str, str]  # of the arguments
    sizes: Callable[
        [Any, Channels], Sizes
    ]  # of a layer. Raises AttributeError if it is written in another way
    is_core: bool = False  # whether it has no weights, and samples at given locations
    attends_itself: bool = False  # whether value may be left out, and the query takes its place
    ways: tuple[
        tuple[bool, bool], ...
    ] = ()  # of a core: one axis for levels and points of locations, of weights

    def roles_in(self, function: Function) -> dict[str, str] | None:
        """The roles of a forward's arguments, or None if it lacks arguments that this form needs."""
        names = inspect.signature(function).parameters
        found = {name: role for name, role in self.roles.items() if name in names}
        needed = {"value", "weights", "locations"} if self.is_core else {"query", "points", "value"}
        has = set(found.values())
        return found if needed <= has and has & {"shapes", "shapes_list"} else None


def _roles(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


_TRANSFORMERS = _roles(
    "hidden_states=query attention_mask=mask encoder_hidden_states=value encoder_attention_mask=ignored "
    "position_embeddings=position reference_points=points spatial_shapes=shapes spatial_shapes_list=shapes_list "
    "level_start_index=starts output_attentions=ignored"
)
_DEFORMABLE_DETR = _roles(
    "query=query reference_points=points input_flatten=value input_spatial_shapes=shapes "
    "input_level_start_index=starts input_padding_mask=mask input_spatial_shapes_hw=pairs"
)
_MMCV = _roles(
    "query=query key=ignored value=value identity=identity query_pos=position key_padding_mask=mask "
    "reference_points=points spatial_shapes=shapes level_start_index=starts"
)
_ULTRALYTICS = _roles("query=query refer_bbox=points value=value value_shapes=shapes_list value_mask=mask")
_RT_DETR = _roles(
    "query=query reference_points=points value=value value_spatial_shapes=shapes_list value_mask=mask"
)
_CORE = _roles(
    "value=value value_spatial_shapes=shapes value_spatial_shapes_list=shapes_list level_start_index=starts "
    "sampling_locations=locations attention_weights=weights im2col_step=step"
)


def _sizes(heads: str, levels: str, points: str, layer: Any, channels: Channels) -> Sizes:
    number = getattr(layer, points)
    if not isinstance(number, int):
        raise AttributeError(points)
    counts = (number,) * getattr(layer, levels)
    query, value = channels["sampling_offsets"], channels["value_proj"]
    return Sizes(getattr(layer, heads), counts, query, value, reach=0.5 / number, scaled=False)


def _sizes_of_v2(points: str, layer: Any, channels: Channels) -> Sizes:
    value = channels["value_proj"] if points == "n_points_list" else layer.d_model
    counts = tuple(getattr(layer, points))
    return Sizes(layer.n_heads, counts, channels["sampling_offsets"], value, layer.offset_scale, scaled=True)


def _sizes_of_core(*_: Any) -> Sizes:
    return Sizes(heads=2, points=(2, 2, 2), query=0, value=4, reach=1.0, scaled=False)


_DETR_SIZES = partial(_sizes, "n_heads", "n_levels", "n_points")
_MMCV_SIZES = partial(_sizes, "num_heads", "num_levels", "num_points")
_FUSED, _PLAIN = "ms_deform_attn_fused", "ms_deform_attn"

FORMS = (
    Form("RT-DETR v2", layers.transformers_v2, _PLAIN, _TRANSFORMERS, partial(_sizes_of_v2, "n_points_list")),
    Form("D-FINE", layers.transformers_v2, _PLAIN, _TRANSFORMERS, partial(_sizes_of_v2, "num_points_list")),
    Form("transformers", partial(layers.transformers, False), _FUSED, _TRANSFORMERS, _DETR_SIZES),
    Form("transformers, Mask2Former", partial(layers.transformers, True), _FUSED, _TRANSFORMERS, _DETR_SIZES),
    Form("ultralytics", partial(layers.of_values, False), _FUSED, _ULTRALYTICS, _DETR_SIZES),
    Form("RT-DETR", partial(layers.of_values, True), _FUSED, _RT_DETR, _MMCV_SIZES),
    Form("Deformable-DETR", layers.deformable_detr, _FUSED, _DEFORMABLE_DETR, _DETR_SIZES),
    Form("mmcv", partial(layers.mmcv, True), _FUSED, _MMCV, _MMCV_SIZES, attends_itself=True),
    Form("GroundingDINO", partial(layers.mmcv, False), _FUSED, _MMCV, _MMCV_SIZES, attends_itself=True),
    Form("transformers, core", layers.core, _PLAIN, _CORE, _sizes_of_core, is_core=True),
)


class Candidate(NamedTuple):
    """A form that a layer may have, with the layer's roles and sizes in that form."""

    form: Form
    roles: dict[str, str]
    sizes: Sizes


def candidates(
    layer: nn.Module, function: Function, channels: Channels, known: tuple[Form, ...] = FORMS
) -> list[Candidate]:
    """The forms that a layer with this forward may have, by the names of its arguments and attributes."""
    found = []
    for form in known:
        roles = form.roles_in(function)
        if roles is None or form.is_core != is_bare(layer):
            continue
        try:
            found.append(Candidate(form, roles, form.sizes(layer, channels)))
        except (AttributeError, KeyError, TypeError):
            continue
    return found


def is_known(function: Function) -> bool:
    """Whether some form of a layer has the arguments of this forward."""
    return any(form.roles_in(function) is not None for form in FORMS)


def is_bare(module: nn.Module) -> bool:
    """Whether a module has no weights and no children."""
    return not (module._parameters or module._buffers or module._modules)


def is_ours(function: Function) -> bool:
    return hasattr(function, "replaces")


def is_such_a_layer(module: nn.Module) -> bool:
    """Whether a module of another project has the children of this layer, in any form of forward."""
    if type(module).__module__.partition(".")[0] == "vitkern":
        return False
    own = {name for name, _ in module.named_children()}  # a wrapper may expose those of the wrapped module
    return {"sampling_offsets", "attention_weights"} <= own


def is_such_a_core(module: nn.Module) -> bool:
    """Whether a module of another project is only code, with arguments like those of the sampling."""
    if type(module).__module__.partition(".")[0] in ("vitkern", "torch") or not is_bare(module):
        return False
    return any(form.is_core and form.roles_in(type(module).forward) is not None for form in FORMS)
