# SPDX-License-Identifier: Apache-2.0
"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """A named model: its builder, its default image size, and its arguments for feature maps, if it has maps."""

    name: str
    build: Callable[..., nn.Module]
    img_size: int
    features: dict[str, Any] | None = None


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    build: Callable[..., nn.Module],
    *,
    img_size: int = 224,
    features: dict[str, Any] | None = None,
) -> None:
    """Registers a builder, which takes `img_size` and its model's arguments; with `features` it returns maps."""
    if name in _ENTRIES:
        raise ValueError(f"there is a model named {name!r} already")
    _ENTRIES[name] = Entry(name, build, img_size, features)


def entry(name: str) -> Entry:
    if name not in _ENTRIES:
        close = difflib.get_close_matches(name, _ENTRIES, n=3, cutoff=0.3)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        raise ValueError(f"there is no model named {name!r}{hint}; vitkern.list_models() has all")
    return _ENTRIES[name]


def list_models(pattern: str = "*", *, maps: bool = False) -> list[str]:
    """The names of the models that match a shell pattern.

    Args:
        maps: whether to list only models with feature maps, for :func:`create_model` with `features_only`.
    """
    names = sorted(fnmatch.filter(_ENTRIES, pattern))
    return [name for name in names if not maps or _ENTRIES[name].features is not None]


def create_model(
    name: str, *, checkpoint: str | None = None, features_only: bool = False, **overrides: Any
) -> nn.Module:
    """Builds a model by name.

    Args:
        name: one of :func:`list_models`.
        checkpoint: a file of published weights to load.
        features_only: whether the model returns feature maps, as pyramids always do; it then has no classifier.
        **overrides: arguments of the model's class that replace the configuration's; all models take `img_size`.
    """
    chosen = entry(name)
    if features_only:
        if chosen.features is None:
            raise ValueError(f"{name} returns no feature maps; {', '.join(list_models(maps=True))} do")
        overrides.pop("num_classes", None)
        overrides = {**chosen.features, **overrides}
    model = chosen.build(**{"img_size": chosen.img_size, **overrides})
    if checkpoint is not None:
        from vitkern.models.checkpoints import load_checkpoint

        load_checkpoint(model, checkpoint)
    return model
