# SPDX-License-Identifier: Apache-2.0
"""LibreYOLO's kernel registry: after ``register()`` all its families call this package's op, on CPUs and in training.

Its registry has a slot, ``ms_deform_attn``, for one function; the newest that takes a call runs. It reads no entry
points, so a call has to register the function.
"""

from __future__ import annotations

import importlib
from typing import Any

from libreyolo import kernels
from torch import Tensor

from vitkern.compat.trial.registries import LIBREYOLO
from vitkern.functional import ms_deform_attn

SLOT, NAME = "ms_deform_attn", "vitkern"


def attend(
    value: Tensor,  # [B, S, M, D]
    spatial_shapes: Any,  # [L, 2]
    sampling_locations: Tensor,  # [B, Q, M, L, P, 2]
    attention_weights: Tensor,  # [B, Q, M, L, P]
) -> Tensor | None:  # [B, Q, M * D]
    """The function in the slot. It returns None for tensors of other devices: the next in the registry then runs."""
    if value.device.type not in ("cpu", "cuda"):
        return None
    return ms_deform_attn(value, spatial_shapes, None, sampling_locations, attention_weights)


def register() -> None:
    """Puts the op first in LibreYOLO's slot."""
    unregister()
    importlib.import_module(LIBREYOLO)  # its kernels would register later, at the first call, and come first
    kernels.register(SLOT, attend, name=NAME)
    kernels.clear_cache()  # models that ran before found no kernel, which the registry remembers


def unregister() -> None:
    """Undoes :func:`register`."""
    kernels.unregister(SLOT, NAME)
    kernels.clear_cache()
