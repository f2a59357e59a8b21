# SPDX-License-Identifier: Apache-2.0
"""Trains ViT-Adapter-T with a UperNet head, or a small VT-FPN, to find shapes by their colour and texture.

    python examples/train_segmentation.py                       # a few minutes on two cores
    python examples/train_segmentation.py --model vt_fpn
    torchrun --nproc-per-node 2 examples/train_segmentation.py  # the same batches, shared by two processes

The images come from a fixed seed: red, blue and striped shapes on grey, each with the same outlines. After a kill,
start it again: it resumes from the last epoch. Pictures of predicted masks and of the attention need matplotlib.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Run, arguments, fit, leave
from vitkern.models import VTFPN, FCNHead, Segmentor, UperNet, create_model
from vitkern.models.attention_maps import sampling_points, token_attention

SIZE, TRAIN, HELD_OUT = 64, 512, 128
CLASSES = ("background", "red", "blue", "striped")
COLOURS = torch.tensor([[0.5, 0.5, 0.5], [0.75, 0.35, 0.35], [0.35, 0.35, 0.75], [0.5, 0.5, 0.5]])
STRIPES = torch.tensor([0.0, 0.0, 0.0, 0.25])
OBJECTS, PERIOD, NOISE = 3, 6.0, 0.08
AUXILIARY = 0.4  # weight of the auxiliary head's loss


class Shapes(NamedTuple):
    images: Tensor  # [N, 3, SIZE, SIZE], about 0
    labels: Tensor  # [N, SIZE, SIZE]


def make_shapes(count: int, seed: int) -> Shapes:
    """Images of a few shapes, 20 to 40 pixels wide; later shapes cover earlier ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1))).uniform_(low, high, generator=generator)

    grid = torch.arange(SIZE).float()
    images = COLOURS[0].view(3, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1).expand(-1, -1, SIZE, SIZE)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for _ in range(OBJECTS):
        label = torch.randint(1, len(CLASSES), (count,), generator=generator)
        y, x, angle = grid[:, None] - uniform(8, 56), grid - uniform(8, 56), uniform(0, math.pi)
        u, v = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
        # A diamond, a disc, a square or a shape between them: |u|^p + |v|^p < r^p.
        radius, power = uniform(10, 20), uniform(1, 5)
        inside = (u.abs() / radius) ** power + (v.abs() / radius) ** power < 1
        stripes = STRIPES[label].view(-1, 1, 1) * (2 * math.pi / PERIOD * u).sin().sign()
        colour = COLOURS[label][:, :, None, None] + uniform(-0.1, 0.1, 3, 1, 1) + stripes[:, None]
        images = torch.where(inside[:, None], colour, images)
        labels = torch.where(inside, label[:, None, None], labels)
    noise = NOISE * torch.randn(images.shape, generator=generator)
    return Shapes((images + noise - 0.5) / 0.25, labels)


def vit_adapter() -> tuple[nn.Module, list[nn.Module]]:
    """The segmentor, and its parts for FSDP to shard one by one."""
    backbone = create_model("vit_adapter_tiny", img_size=SIZE)
    channels = backbone.feature_info.channels()
    head = UperNet(channels, len(CLASSES), channels=64)
    auxiliary = FCNHead(channels[2], len(CLASSES), channels=64)
    return Segmentor(backbone, head, auxiliary), list(backbone.blocks)


def vt_fpn() -> tuple[nn.Module, list[nn.Module]]:
    widths = dict(token_channels=128, key_channels=64, out_channels=64, projector_channels=32)
    model = VTFPN(18, num_classes=len(CLASSES), head_channels=64, **widths)
    return model, [model.layer1, model.layer2, model.layer3, model.layer4]


MODELS = {"vit_adapter": vit_adapter, "vt_fpn": vt_fpn}


def share_statistics(net: nn.Module, device: torch.device) -> None:
    """Synchronises all BatchNorms on a GPU and none on a CPU: DDP refuses such layers there."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                plain = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
                plain.load_state_dict(child.state_dict())
                setattr(parent, name, plain)


def train(run: Run, model: nn.Module, data: Shapes, held_out: Shapes, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)

    def loss(batch: Tensor) -> Tensor:
        logits = model(data.images[batch])
        heads = logits if isinstance(logits, tuple) else (logits,)
        losses = [F.cross_entropy(head, data.labels[batch]) for head in heads]
        return losses[0] + AUXILIARY * sum(losses[1:])

    fit(
        run,
        model,
        optimizer,
        loss,
        label=options.model,
        samples=len(data.labels),
        batch_size=options.batch_size,
        epochs=options.epochs,
        lr=options.lr,
        evaluate=lambda: f"held out {class_ious(run, model, held_out, options.batch_size).mean():.3f}",
    )


def class_ious(run: Run, model: nn.Module, data: Shapes, batch_size: int) -> Tensor:
    """The intersection over union of each class, over all pixels and processes."""
    counts = torch.zeros(len(CLASSES), len(CLASSES), device=run.device, dtype=torch.long)
    with torch.no_grad(), run.autocast():
        for batch in run.batches(len(data.labels), batch_size):
            pairs = data.labels[batch] * len(CLASSES) + model(data.images[batch]).argmax(1)
            counts += pairs.flatten().bincount(minlength=counts.numel()).view_as(counts)
    run.sum(counts)
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both).clamp(min=1)


def looks(net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The attention in an image as maps of its size: weighted sampling points, or the tokens' weights of pixels."""
    height, width = image.shape[2:]
    if not isinstance(net, Segmentor):
        tokens = next(iter(token_attention(net, image).values()))[0, :4]
        maps = F.interpolate(tokens[None], (height, width), mode="bilinear", align_corners=False)[0]
        return {f"token {index}": shown for index, shown in enumerate(maps)}
    maps = {}
    for name, (locations, weights) in sampling_points(net, image).items():
        query = (locations[0].mean((1, 2, 3)) - 0.5).square().sum(-1).argmin()  # the one in the middle
        x, y = (locations[0, query] * locations.new_tensor([width, height])).floor().long().unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        seen = weights.new_zeros(1, height, width)
        seen[0].index_put_((y[inside], x[inside]), weights[0, query][inside], accumulate=True)
        layer = name.removeprefix("backbone.interactions.").removesuffix(".attn")
        maps[layer] = F.max_pool2d(seen, 3, stride=1, padding=1)[0]  # makes the points visible
    return maps


def draw(run: Run, model: nn.Module, data: Shapes, label: str) -> None:
    """Draws masks and attention. All processes compute: a sharded model needs all of them."""
    images, labels = (part[:8] for part in data)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    seen = dict(list(looks(model, images[:1]).items())[:8])
    if not run.main:
        return
    try:
        import matplotlib
    except ImportError:
        run.say("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def save(rows: dict[str, list[Tensor]], name: str, titles: Sequence[str] = (), **options) -> None:
        count = len(next(iter(rows.values())))
        figure, axes = plt.subplots(len(rows), count, figsize=(1.5 * count, 1.5 * len(rows)), squeeze=False)
        for row, (heading, pictures) in enumerate(rows.items()):
            axes[row, 0].set_ylabel(heading)
            for axis, picture in zip(axes[row], pictures):
                axis.imshow(picture.cpu().numpy(), **options)
                axis.set_xticks([])
                axis.set_yticks([])
        for axis, title in zip(axes[0], titles):
            axis.set_title(title, fontsize=7)
        path = run.output / f"{label}_{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        run.say(f"picture: {path}")

    pictures = (images * 0.25 + 0.5).clamp(0, 1).movedim(1, -1)
    masks = dict(image=list(pictures), truth=list(labels), predicted=list(predicted))
    save(masks, "masks", cmap="viridis", vmin=0, vmax=len(CLASSES) - 1)
    save({"": [pictures[0], *seen.values()]}, "looks", titles=["image", *seen], cmap="magma")


def main(argv: Sequence[str] | None = None) -> float:
    parser = arguments(__doc__, output="runs/train_segmentation", epochs=8, batch_size=16, lr=1e-3)
    parser.add_argument("--model", choices=MODELS, default="vit_adapter")
    options = parser.parse_args(argv)
    with Run(options) as run:
        data, held_out = (run.some(make_shapes(count, seed)) for seed, count in enumerate((TRAIN, HELD_OUT)))
        net, blocks = MODELS[options.model]()
        if run.world_size > 1:
            share_statistics(net, run.device)
        model = run.parallel(net, blocks)
        train(run, model, data, held_out, options)
        ious = class_ious(run, model, held_out, options.batch_size)
        reached = ious.mean().item()
        each = ", ".join(f"{name} {iou:.3f}" for name, iou in zip(CLASSES, ious.tolist()))
        run.say(f"held-out mIoU: {reached:.4f} on {len(held_out.labels)} images ({each})")
        draw(run, net, held_out, options.model)
    return reached


if __name__ == "__main__":
    leave(0 if main() else 1)
