# SPDX-License-Identifier: Apache-2.0
"""ResNet (arXiv 1512.03385) without its classifier, under torchvision's names. Loads published weights."""

from __future__ import annotations

from torch import Tensor, nn

from vitkern.models.blocks import checkpointed
from vitkern.models.pyramid import Backbone

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _shortcut(channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out_channels:
        return None
    conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + shortcut).relu()


class ResNet(Backbone):
    """The first stages, of strides 4, 8, 16 and 32.

    Args:
        depth: 18, 34, 50 or 101.
        stages: number of stages, up to four.
        with_cp: whether backward recomputes each block.
    """

    def __init__(self, depth: int, in_chans: int = 3, stages: int = 4, with_cp: bool = False) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {tuple(DEPTHS)}, got {depth}")
        block = BasicBlock if depth < 50 else Bottleneck
        self.in_chans, self.with_cp = in_chans, with_cp
        self.channels = [(64 << stage) * block.expansion for stage in range(stages)]
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = 64
        for stage, channels in enumerate(self.channels):
            strides = [1 if stage == 0 else 2] + [1] * (DEPTHS[depth][stage] - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(before, 64 << stage, stride))
                before = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, image: Tensor) -> list[Tensor]:
        """The map of each stage."""
        self._check_channels(image)
        x = self.maxpool(self.bn1(self.conv1(image)).relu())
        maps = []
        for stage in range(len(self.channels)):
            for block in self.get_submodule(f"layer{stage + 1}").children():
                x = checkpointed(block, x, with_cp=self.with_cp)
            maps.append(x)
        return maps
