# SPDX-License-Identifier: Apache-2.0
"""The picture of `vitkern demo`: where queries sample, before and after their sampling points were fitted.

No trained detector is involved. A few queries on a photograph start from the star of points that ``MSDeformAttn``
begins with. Gradient descent through the op's own backward then moves the points, and shifts their attention weights,
until the samples of a head have the colour at its query.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import vitkern

HEADS, POINTS, STEPS = 8, 4, 200
STRIDES = (4, 8, 16, 32)
# The object under each query, and the query's place on the photograph, in pixels (x, y).
QUERIES = {"cheek": (217, 268), "cap": (184, 69), "flag": (113, 322), "jacket": (330, 520)}
QUERY_COLOURS = ("#ffd400", "#00e5ff", "#ff4fd8", "#7cff4f")


def photograph() -> Tensor:
    """Rear Admiral Grace Hopper, a public-domain picture in matplotlib's sample data: [3, H, W] in [0, 1]."""
    from matplotlib import cbook
    from PIL import Image

    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    height, width = (side // STRIDES[-1] * STRIDES[-1] for side in pixels.shape[:2])
    return torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)


class Sampler:
    """Queries on the colour pyramid of a photograph, with sampling points of their own."""

    def __init__(self, photo: Tensor) -> None:
        levels = [F.avg_pool2d(photo[None], stride)[0] for stride in STRIDES]
        self.shapes = torch.tensor([level.shape[1:] for level in levels])
        self.starts = self.shapes.prod(1).cumsum(0) - self.shapes.prod(1)
        colours = torch.cat([level.flatten(1).t() for level in levels])  # [S, 3]
        # With the squares, the weighted mean of the samples is right only if every sample is.
        features = torch.cat([colours, colours**2], -1)  # [S, 6]
        self.value = features[None, :, None].expand(-1, -1, HEADS, -1)
        size = torch.tensor([photo.shape[2], photo.shape[1]])
        self.reference = (torch.tensor(list(QUERIES.values())) + 0.5) / size  # [Q, 2]
        self.wanted = torch.stack([features[self._pixel(xy)] for xy in self.reference])[None, :, None]

        star = vitkern.nn.MSDeformAttn(8 * HEADS, len(STRIDES), HEADS, POINTS).sampling_offsets.bias.detach()
        star = star.view(1, 1, HEADS, len(STRIDES), POINTS, 2).expand(1, len(QUERIES), -1, -1, -1, -1)
        self.offsets = star.clone().requires_grad_()
        self.logits = torch.zeros(*star.shape[:3], len(STRIDES) * POINTS, requires_grad=True)

    def _pixel(self, xy: Tensor) -> int:
        """The pixel of the finest level under a location."""
        height, width = self.shapes[0].tolist()
        return int(xy[1] * height) * width + int(xy[0] * width)

    def locations(self) -> Tensor:  # [1, Q, M, L, P, 2]
        return self.reference[:, None, None, None] + self.offsets / self.shapes.flip(-1)[:, None]

    def weights(self) -> Tensor:  # [1, Q, M, L, P]
        return self.logits.softmax(-1).unflatten(-1, (len(STRIDES), POINTS))

    def fit(self) -> list[float]:
        """Moves points and weights; returns the error at each step."""
        optimizer = torch.optim.Adam(
            [{"params": [self.offsets], "lr": 0.1}, {"params": [self.logits], "lr": 0.02}]
        )
        errors = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            sampled = vitkern.ms_deform_attn(
                self.value, self.shapes, self.starts, self.locations(), self.weights()
            )
            error = (sampled.unflatten(-1, (HEADS, -1)) - self.wanted).square().sum(-1).mean()
            error.backward()
            optimizer.step()
            errors.append(error.item())
        return errors


def draw(folder: Path) -> Path:
    """Fits, draws, and prints the path of the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    photo = photograph()
    sampler = Sampler(photo)
    before = sampler.locations().detach()[0], sampler.weights().detach()[0]
    errors = sampler.fit()
    after = sampler.locations().detach()[0], sampler.weights().detach()[0]

    figure = plt.figure(figsize=(12.8, 11.6), facecolor="white")
    grid = figure.add_gridspec(
        2, 4, height_ratios=[2, 1], left=0.01, right=0.99, top=0.965, bottom=0.06, hspace=0.07, wspace=0.03
    )
    titles = "Where MSDeformAttn starts", f"After {STEPS} steps of gradient descent"
    for column, (title, points) in enumerate(zip(titles, (before, after))):
        axes = figure.add_subplot(grid[0, 2 * column : 2 * column + 2])
        _photograph(axes, photo, *points)
        axes.set_title(title, fontsize=15)
    for level in range(len(STRIDES)):
        axes = figure.add_subplot(grid[1, level])
        _level(axes, photo, level, before[0][:, :, level], after[0][:, :, level], after[1][:, :, level])
    caption = (
        "Colour: query. Area of a dot: attention weight. Below, each level as the op sees it: hollow rings are the "
        "starting points, lines lead to where they went.\nNo trained network: points and weights were fitted so that "
        f"the colour a head samples is that at its query (mean squared error {errors[0]:.3f} to {errors[-1]:.4f})."
    )
    figure.text(0.5, 0.012, caption, ha="center", fontsize=10.5, color="#333333", linespacing=1.5)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sampling.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.resolve()


def _photograph(axes: Any, photo: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Draws all points of all levels over the photograph."""
    height, width = photo.shape[1:]
    axes.imshow((photo.permute(1, 2, 0) * 0.72).numpy(), extent=(0, width, height, 0))
    for query, (name, colour) in enumerate(zip(QUERIES, QUERY_COLOURS)):
        x, y = (locations[query].reshape(-1, 2) * torch.tensor([width, height])).t().numpy()
        area = 900 * weights[query].flatten().numpy()
        axes.scatter(x, y, s=area, color=colour, alpha=0.75, edgecolors="black", linewidths=0.4)
        centre = QUERIES[name]
        axes.scatter(*centre, marker="+", s=190, color="black", linewidths=4.5, zorder=3)
        axes.scatter(*centre, marker="+", s=160, color=colour, linewidths=2, zorder=4)
    _frame(axes, width, height)


def _level(axes: Any, photo: Tensor, level: int, before: Tensor, after: Tensor, weights: Tensor) -> None:
    """Draws one level at its own resolution, and the paths of its points."""
    height, width = photo.shape[1:]
    pixels = F.avg_pool2d(photo[None], STRIDES[level])[0]
    axes.imshow(
        (pixels.permute(1, 2, 0) * 0.72).numpy(), extent=(0, width, height, 0), interpolation="nearest"
    )
    size = torch.tensor([width, height])
    for query, colour in enumerate(QUERY_COLOURS):
        first, last = ((points[query].reshape(-1, 2) * size).numpy() for points in (before, after))
        axes.plot(*np.stack([first, last]).transpose(2, 0, 1), color=colour, linewidth=0.9, alpha=0.8)
        axes.scatter(*first.T, s=9, facecolors="none", edgecolors=colour, linewidths=0.7)
        axes.scatter(
            *last.T,
            s=450 * weights[query].flatten().numpy(),
            color=colour,
            edgecolors="black",
            linewidths=0.3,
        )
    axes.set_title(f"level {level}: {pixels.shape[1]} x {pixels.shape[2]}", fontsize=11)
    _frame(axes, width, height)


def _frame(axes: Any, width: int, height: int) -> None:
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
