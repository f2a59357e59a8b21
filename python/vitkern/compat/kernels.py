# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's ``kernels``: after ``register()``, ``use_kernels=True`` and ``kernelize`` pick this package's layer.

Nothing is downloaded. The layer then runs in models of transformers whose deformable attention is marked as
"MultiScaleDeformableAttention" (Deformable-DETR, GroundingDINO, RT-DETR and others), on CPUs and on GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import kernels
from torch import Tensor, nn

from vitkern.functional import ms_deform_attn

NAME = "MultiScaleDeformableAttention"

# The defaults of transformers, by device, as register() found them.
_theirs: dict[str, Any] | None = None


class MultiScaleDeformableAttention(nn.Module):
    """The replacement for the forward of layers of that name. kernels allows it no state and no other method."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,  # [B, S, M, D]
        value_spatial_shapes: Tensor,  # [L, 2]
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,  # [L]
        sampling_locations: Tensor,  # [B, Q, M, L, P, 2]
        attention_weights: Tensor,  # [B, Q, M, L, P]
        im2col_step: int,
    ) -> Tensor:  # [B, Q, M * D]
        return ms_deform_attn(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
        )


class Repository:
    """The repository in which kernels finds the layer."""

    layer_name = NAME

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Repository)

    def __hash__(self) -> int:
        return hash(NAME)

    def __str__(self) -> str:
        return f"vitkern (layer `{NAME}`)"


def mapping() -> dict[str, dict[str, Repository]]:
    """The mapping for ``kernels.use_kernel_mapping``, which is temporary; :func:`register` is permanent."""
    return {NAME: {device: Repository() for device in ("cpu", "cuda")}}


def register() -> None:
    """Registers our layer under that name, in kernels and, if transformers is imported, among its defaults.

    Call it after ``import transformers`` and before a model is built with ``use_kernels=True``.
    """
    global _theirs
    kernels.register_kernel_mapping(mapping())
    defaults = _defaults_of_transformers()
    if defaults is not None and _theirs is None:
        # transformers registers its defaults again for each model, over all others.
        _theirs = defaults.get(NAME, {})
        defaults[NAME] = _theirs | mapping()[NAME]


def unregister() -> None:
    """Undoes :func:`register`, for models that are built or kernelized from now on."""
    global _theirs
    from kernels.layer.globals import _KERNEL_MAPPING

    _KERNEL_MAPPING.get().pop(NAME, None)
    defaults = _defaults_of_transformers()
    if defaults is not None and _theirs is not None:
        defaults[NAME] = _theirs
        kernels.register_kernel_mapping({NAME: _theirs})
    _theirs = None


def _defaults_of_transformers() -> dict[str, dict[str, Any]] | None:
    if "transformers" not in sys.modules:
        return None
    from transformers.integrations import hub_kernels

    return hub_kernels.get_kernel_mapping_transformers()
