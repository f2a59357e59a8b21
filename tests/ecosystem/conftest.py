# SPDX-License-Identifier: Apache-2.0
"""Makes packages importable whose compiled parts are missing or do not fit this torch. No test uses these parts."""

import importlib.metadata
import importlib.util
import os
import tempfile

import torch

import vitkern

# The index's torchvision is a CUDA build: beside a torch for CPUs its ops are missing, of which it registers fakes.
_FOUND = importlib.util.find_spec("torchvision")
if torch.version.cuda is None and _FOUND and "+cpu" not in importlib.metadata.version("torchvision"):
    _SCHEMAS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# mmcv-lite has no compiled module, which mmcv.ops imports, and with it mmdet and mmseg.
if importlib.util.find_spec("mmcv"):
    vitkern.install("mmcv")

# ultralytics looks for a network and installs packages that it misses.
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
