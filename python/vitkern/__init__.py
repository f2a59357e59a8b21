# SPDX-License-Identifier: Apache-2.0
"""CUDA, Triton and native CPU kernels, with PyTorch autograd, for the ViT-Adapter family of vision models."""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING

from vitkern.compat import imports

if TYPE_CHECKING:
    from vitkern import models, nn
    from vitkern._C import version as __version__
    from vitkern.compat.install import install, uninstall
    from vitkern.compat.patching import patch, patched, unpatch
    from vitkern.functional import (
        adapter_bottleneck,
        ms_deform_attn,
        ms_deform_attn_fused,
        token_pool,
        token_project,
    )
    from vitkern.models import create_model, list_models
    from vitkern.ops import backends as backends

__all__ = [
    "__version__",
    "adapter_bottleneck",
    "create_model",
    "install",
    "list_models",
    "models",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "nn",
    "patch",
    "patched",
    "token_pool",
    "token_project",
    "uninstall",
    "unpatch",
]

# The modules of public names. They are imported on first use, so that the command line answers without loading torch.
_HOMES = {
    "adapter_bottleneck": "vitkern.functional",
    "create_model": "vitkern.models",
    "install": "vitkern.compat.install",
    "list_models": "vitkern.models",
    "ms_deform_attn": "vitkern.functional",
    "ms_deform_attn_fused": "vitkern.functional",
    "patch": "vitkern.compat.patching",
    "patched": "vitkern.compat.patching",
    "token_pool": "vitkern.functional",
    "token_project": "vitkern.functional",
    "uninstall": "vitkern.compat.install",
    "unpatch": "vitkern.compat.patching",
}
_MODULES = {"backends": "vitkern.ops.backends", "models": "vitkern.models", "nn": "vitkern.nn"}


def _load(name: str) -> object:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name == "__version__":
        return import_module("vitkern._C").version
    return getattr(import_module(_HOMES[name]), name)


def _register(torch: object) -> None:
    """Defines torch.ops.vitkern, which exported programs look for, once torch and vitkern are both imported."""
    imports.withdraw("torch")
    with contextlib.suppress(
        ImportError
    ):  # `vitkern doctor` runs without the ops; every other use raises the reason
        functions = vars(import_module("vitkern.functional"))  # or a part of it, if its import is in progress
        globals().update({name: functions[name] for name in _HOMES if name in functions})


if not TYPE_CHECKING:  # a type checker must see only the names above

    def __getattr__(name: str) -> object:
        if name not in (*__all__, *_MODULES):
            raise AttributeError(f"module 'vitkern' has no attribute {name!r}")
        try:
            globals()[name] = _load(name)
        except ImportError as error:
            raise ImportError(
                f"vitkern does not load ({error}); `python -m vitkern doctor` says more"
            ) from error
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


imports.follow("torch", _register)
