# SPDX-License-Identifier: Apache-2.0
"""What lets packages be imported whose compiled parts are not for this torch. Tests need none of those parts."""

import importlib.util
import sys
from types import ModuleType

import torch

# The index's torchvision is a CUDA build: beside a torch for CPUs its ops are missing, of which it registers fakes.
if torch.version.cuda is None:
    _SCHEMAS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class NoOps(ModuleType):
    """In place of mmcv's compiled ops, which mmcv-lite lacks and which mmseg and mmdet import by name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def op(*args, **options):
            raise NotImplementedError(f"mmcv-lite has no {name}")

        return op


if importlib.util.find_spec("mmcv") and not importlib.util.find_spec("mmcv._ext"):
    sys.modules["mmcv._ext"] = NoOps("mmcv._ext")
