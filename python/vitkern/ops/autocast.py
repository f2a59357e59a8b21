# SPDX-License-Identifier: Apache-2.0
"""The dtype of a call under autocast. The public functions cast; the ops below them ignore autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vitkern.ops import private

# Whether autocast is on for any device.
any_autocast = private.any_autocast()


def autocast_dtype(value: Tensor, *others: Tensor) -> torch.dtype | None:
    """The dtype for value under autocast; None if it is off, or value is float64, integers or no tensor."""
    if not any_autocast():
        return None
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in (value, *others)):
        return None
    device_type = value.device.type
    if not (_knows_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    return None if value.dtype == torch.float64 else torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast, for tensors that have been cast already, or must not be."""
    if any_autocast() and _knows_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@private.assume_constant_result  # torch 2.4 cannot trace this call
def _knows_autocast(device_type: str) -> bool:
    """Whether a device type has autocast; else ("meta", others in older releases) a query of its state would raise."""
    return torch.amp.is_autocast_available(device_type)
