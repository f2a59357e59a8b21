# SPDX-License-Identifier: Apache-2.0
"""Lets the index's torchvision, a CUDA build, be imported beside a torch for CPUs: it registers fakes of these ops."""

import torch

if torch.version.cuda is None:
    _SCHEMAS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
