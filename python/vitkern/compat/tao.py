# SPDX-License-Identifier: Apache-2.0
"""The ops of NVIDIA TAO, ``torch.ops.nvidia``, where its compiled library is missing: ``vitkern.install("tao")``.

TAO's layers load that library when they are built. With these ops they load none, and their autograd function calls
this package's kernels, forward and backward, on CPUs and on CUDA.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from vitkern.compat import deformable_detr, forms, imports
from vitkern.compat.table import Table
from vitkern.ops.ms_deform_attn import ms_deform_attn

PACKAGE = "nvidia_tao_pytorch"
_FOLDER = f"{PACKAGE}.cv.deformable_detr.model.ops"
_FUNCTIONS = f"{_FOLDER}.functions"  # defines load_ops, which loads the library
_LIBRARY = "MultiScaleDeformableAttention.cpython-"  # the beginning of its file's name

_INPUTS = (
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_loc, Tensor attn_weight"
)

_library: Library | None = None


def attend(
    value: Tensor,  # [B, S, M, D]
    spatial_shapes: Tensor,  # [L, 2]
    level_start_index: Tensor,  # [L]
    sampling_loc: Tensor,  # [B, Q, M, L, P, 2]
    attn_weight: Tensor,  # [B, Q, M, L, P]
) -> Tensor:  # [B, Q, M, D]
    """The op for the forward pass. It has gradients of its own too, if it is called without TAO's function."""
    inputs = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    return ms_deform_attn(*inputs, None, "bilinear", None).unflatten(-1, value.shape[2:])


def backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,  # [B, Q, M, D]
    im2col_step: int,  # without effect
) -> list[Tensor]:
    """The op for the backward pass: the gradients of value, sampling_loc and attn_weight."""
    inputs = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    return deformable_detr.ms_deform_attn_backward(*inputs, grad_output.flatten(2))


_OPS = {
    "MultiscaleDeformableAttnPlugin_TRT": (f"({_INPUTS}) -> Tensor", attend),
    "DMHA_backward": (f"({_INPUTS}, Tensor grad_output, int im2col_step) -> Tensor[]", backward),
}


def install(*, override: bool) -> Table:
    """Registers the ops, and makes TAO's layers load no library.

    Raises:
        RuntimeError: TAO's library is loaded, or it is installed and ``override`` is not set.
    """
    global _library
    if _library is None:
        _refuse(override)
        _library = Library("nvidia", "FRAGMENT")
        for name, (schema, function) in _OPS.items():
            _library.define(name + schema)
            _library.impl(name, function, "CompositeImplicitAutograd")
    imports.follow(_FUNCTIONS, _load_nothing)
    rows = [(f"torch.ops.nvidia.{name}", "not there", "ms_deform_attn") for name in _OPS]
    return Table([*rows, (_FUNCTIONS, "load_ops", "vitkern's")])


def uninstall() -> list[tuple[str, str, str]]:
    """Undoes ``install``. Returns the rows for a table."""
    global _library
    if _library is None:
        return []
    _library._destroy()
    _library = None
    imports.withdraw(_FUNCTIONS)
    for module in _modules():
        loader = vars(module).get("load_ops")
        if loader is not None and forms.is_ours(loader):
            module.load_ops = loader.replaces  # type: ignore[attr-defined]
    return [
        (place, "vitkern's", "as it was")
        for place in (*(f"torch.ops.nvidia.{name}" for name in _OPS), _FUNCTIONS)
    ]


def _refuse(override: bool) -> None:
    """Raises if the ops exist already, or could."""
    for name in _OPS:
        if hasattr(torch.ops.nvidia, name):
            raise RuntimeError(
                f"install: torch.ops.nvidia.{name} is there already, from a library that this process has loaded: "
                "start another process and call install('tao') before TAO's layers are built"
            )
    file = None if override else _installed()
    if file is not None:
        raise RuntimeError(
            f"install: the library of torch.ops.nvidia is installed, as {file}. "
            "Remove it, or call install('tao', override=True) to have vitkern's"
        )


def _installed() -> Path | None:
    """TAO's library for this Python, if there is one. TAO is found, not imported."""
    spec = imports.find_elsewhere(_FOLDER)
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob(f"{_LIBRARY}{version}-*")):
            return file
    return None


def _modules() -> list[ModuleType]:
    """The imported modules of TAO."""
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{PACKAGE}.")]


def _load_nothing(module: ModuleType) -> None:
    """Replaces ``load_ops`` in its module and in those that have imported it."""
    original: Any = getattr(module, "load_ops", None)
    if original is None:
        raise ImportError(
            f"vitkern.install expects the function load_ops in {_FUNCTIONS}, which has none in this version; "
            "vitkern.uninstall() leaves it as it is"
        )
    if forms.is_ours(original):
        return

    @functools.wraps(original)
    def load_ops(ops_dir: str, lib_name: str) -> None:
        if not lib_name.startswith(_LIBRARY):
            original(ops_dir, lib_name)

    load_ops.replaces = original  # type: ignore[attr-defined]
    for each in _modules():
        if vars(each).get("load_ops") is original:
            each.load_ops = load_ops  # type: ignore[attr-defined]
