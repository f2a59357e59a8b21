# SPDX-License-Identifier: Apache-2.0
"""Real data without a download: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Run

HELD_OUT = 0.3


class Digits(NamedTuple):
    images: Tensor  # [N, 1, size, size], from -1 to 1
    labels: Tensor  # [N]


def load_digits(size: int) -> tuple[Digits, Digits]:
    """The digits for training and the held-out digits; the split is always the same."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None
    data = load()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order.tensor_split([round(HELD_OUT * len(order))])
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def augment(images: Tensor) -> Tensor:
    """Rotates each image by up to 15 degrees, scales and shears it by up to 10 % and shifts it by up to 8 %."""
    angle, shear, scale_x, scale_y, right, down = torch.empty(6, len(images)).uniform_(-1, 1)
    angle = math.radians(15) * angle
    cos, sin = angle.cos(), angle.sin()
    x, y = 1 + 0.1 * scale_x, 1 + 0.1 * scale_y
    rows = torch.stack([x * cos, -y * sin + 0.1 * shear, 0.16 * right, x * sin, y * cos, 0.16 * down])
    theta = rows.T.unflatten(1, (2, 3)).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside is the background, -1


def accuracy(run: Run, model: nn.Module, data: Digits, batch_size: int) -> float:
    """The accuracy over all processes."""
    right = torch.zeros((), device=run.device)
    with torch.no_grad(), run.autocast():
        for batch in run.batches(len(data.labels), batch_size):
            right += (model(data.images[batch]).argmax(-1) == data.labels[batch]).sum()
    return run.sum(right).item() / len(data.labels)
