# SPDX-License-Identifier: Apache-2.0
"""CUDA, Triton and native CPU kernels, with PyTorch autograd, for the ViT-Adapter family of vision models."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

try:
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
except ImportError as error:
    # `vitkern doctor` has to run where the compiled module or torch does not load; every other use says why it cannot.
    _cause = error

    if not TYPE_CHECKING:  # a checker is to see the names above and no others

        def __getattr__(name: str) -> object:
            if name not in __all__:
                raise AttributeError(f"module 'vitkern' has no attribute {name!r}")
            raise ImportError(
                f"vitkern does not load ({_cause}); `python -m vitkern doctor` says more"
            ) from _cause
