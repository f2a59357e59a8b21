# SPDX-License-Identifier: Apache-2.0
"""Segmentation heads for a pyramid, under mmseg's names, and the parameter count of a detector.

Normalisation is BatchNorm2d, with the same keys as SyncBatchNorm. On several GPUs, convert a model by
``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.models.pyramid import FeatureInfo
from vitkern.models.table import count_parameters

Maps = Sequence[Tensor]  # [B, C, H / s, W / s], from the smallest stride s to the largest


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    """A convolution that keeps the size, then BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class DecodeHead(nn.Module):
    """A head that ends in a linear classifier of each pixel's features."""

    def __init__(self, channels: int, num_classes: int, dropout_ratio: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def classify(self, features: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(features))


class UperNet(DecodeHead):
    """UperNet's head (arXiv 1807.10221): pools of the last map, then a feature pyramid, fused at stride 4.

    Training needs batches of two images or more: the pool of one cell cannot be normalised otherwise.

    Args:
        in_channels: channels of the maps.
        channels: channels of the head's convolutions.
        pool_scales: height and width of each pool.
        dropout_ratio: dropout of whole channels before the classifier.

    Returns logits ``[B, num_classes, H / 4, W / 4]``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout_ratio: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout_ratio)
        *finer, last = self.in_channels = tuple(in_channels)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(last, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(last + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * channels, channels, 3)

    def forward(self, maps: Maps) -> Tensor:
        if [m.shape[1] for m in maps] != list(self.in_channels):
            raise ValueError(
                f"UperNet: maps must have {list(self.in_channels)} channels, got {[m.shape[1] for m in maps]}"
            )
        *finer, last = maps
        pools = [resize(pool(last), last.shape[2:]) for pool in self.psp_modules]
        x = self.bottleneck(torch.cat([last, *pools], dim=1))
        levels = [x]
        for level in reversed(range(len(finer))):
            x = self.lateral_convs[level](finer[level]) + resize(x, finer[level].shape[2:])
            levels.append(self.fpn_convs[level](x))
        levels = [resize(level, maps[0].shape[2:]) for level in reversed(levels)]
        return self.classify(self.fpn_bottleneck(torch.cat(levels, dim=1)))


class FCNHead(DecodeHead):
    """An auxiliary head for training: one convolution and a classifier on one of the maps.

    Args:
        in_channels: channels of the map.
        channels: channels of the convolution.
        in_index: number of the map.
        dropout_ratio: dropout of whole channels before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        in_index: int = 2,
        dropout_ratio: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout_ratio)
        self.in_channels, self.in_index = in_channels, in_index
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))

    def forward(self, maps: Maps) -> Tensor:
        widths = [m.shape[1] for m in maps]
        known = -len(maps) <= self.in_index < len(maps)
        if not known or widths[self.in_index] != self.in_channels:
            raise ValueError(
                f"FCNHead: map {self.in_index} must have {self.in_channels} channels, the maps have {widths}"
            )
        return self.classify(self.convs(maps[self.in_index]))


class Segmentor(nn.Module):
    """Images [B, C, H, W] to logits of the pixels, [B, num_classes, H, W].

    In training with an auxiliary head it returns ``(logits, auxiliary)``.

    Args:
        backbone: a model that returns the maps for the heads.
        decode_head: the main head.
        auxiliary_head: a head for training only.
    """

    def __init__(
        self, backbone: nn.Module, decode_head: nn.Module, auxiliary_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps, size = self.backbone(image), image.shape[2:]
        logits = resize(self.decode_head(maps), size)
        if self.auxiliary_head is None or not self.training:
            return logits
        return logits, resize(self.auxiliary_head(maps), size)


def mask_rcnn_parameters(backbone: nn.Module, num_classes: int = 80) -> int:
    """The number of parameters of mmdet's standard Mask R-CNN with this backbone; the detector is not built.

    ========== ==============================================================================================
    backbone   its own
    FPN        1 x 1 from each map to 256 channels, then 3 x 3 of 256 channels; a fifth map is pooled
    RPN        3 x 3 of 256 channels, then 1 x 1 to a score and a box for each of 3 anchors
    box head   7 x 7 x 256 to 1024, 1024 to 1024, then to the classes, with one for none, and a box for each class
    mask head  four 3 x 3 of 256 channels, a transposed 2 x 2, then 1 x 1 to a mask for each class
    ========== ==============================================================================================
    """
    info: FeatureInfo = backbone.feature_info  # type: ignore[assignment]
    width, hidden, anchors = 256, 1024, 3

    def affine(inputs: int, outputs: int, taps: int = 1) -> int:
        return taps * inputs * outputs + outputs

    fpn = sum(affine(channels, width) + affine(width, width, 9) for channels in info.channels())
    rpn = affine(width, width, 9) + affine(width, anchors) + affine(width, 4 * anchors)
    box_head = affine(width, hidden, 49) + affine(hidden, hidden)
    box_head += affine(hidden, num_classes + 1) + affine(hidden, 4 * num_classes)
    mask_head = 4 * affine(width, width, 9) + affine(width, width, 4) + affine(width, num_classes)
    return count_parameters(backbone) + fpn + rpn + box_head + mask_head
