# SPDX-License-Identifier: Apache-2.0
"""``import vitkern.compat.timm`` makes every model of this package known to timm under the same name.

``timm.create_model("vit_adapter_base", img_size=384)`` then is ``vitkern.create_model`` with these arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn

from vitkern.models.registry import create_model, list_models


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """The function that timm calls for a name, with its own arguments and then the model's."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no weights to download: give checkpoint=file, not pretrained=True")
        return create_model(name, **options)

    build.__name__ = build.__qualname__ = name
    return build


# timm adds each name to the __all__ of the module that its function comes from, so that module needs one.
__all__: list[str] = []
for _name in list_models():
    globals()[_name] = register_model(_entrypoint(_name))
