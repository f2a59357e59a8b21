# SPDX-License-Identifier: Apache-2.0
"""Trains a small ViTAE on handwritten digits, then draws its attention.

    python examples/classify_vitae.py                       # about a minute on two cores
    python examples/classify_vitae.py --model vitaev2
    torchrun --nproc-per-node 2 examples/classify_vitae.py  # the same batches, shared by two processes

After a kill, start it again: it resumes from the last epoch. Pictures need matplotlib: Grad-CAM of held-out digits, and
the mean attention distance of each layer in pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Run, arguments, fit, leave
from digits import Digits, accuracy, augment, load_digits
from vitkern.models import ViTAE, ViTAEv2
from vitkern.models.attention_maps import grad_cam, mean_attention_distances

SIZE = 32
# An image of 32 x 32 has maps of 16 x 16, 8 x 8 and 4 x 4, as one of 64 x 64 in the published models.
COMMON = dict(
    img_size=SIZE, in_chans=1, num_classes=10, downsample_ratios=2, NC_depth=[0, 1, 3], drop_path_rate=0.1
)
MODELS = {
    "vitae": lambda: ViTAE(
        embed_dims=[16, 16, 48], token_dims=[32, 32, 96], NC_heads=[1, 2, 4], NC_group=[1, 8, 24], **COMMON
    ),
    "vitaev2": lambda: ViTAEv2(
        stages=3,
        embed_dims=[16, 16, 32],
        token_dims=[32, 48, 96],
        RC_heads=1,
        RC_group=[1, 8, 16],
        NC_heads=[1, 2, 4],
        NC_group=[1, 8, 24],
        mlp_ratio=2.0,
        **COMMON,
    ),
}


def train(run: Run, model: nn.Module, data: Digits, held_out: Digits, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.05)

    def loss(batch: Tensor) -> Tensor:
        logits = model(augment(data.images[batch]))
        return F.cross_entropy(logits, data.labels[batch], label_smoothing=0.1)

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
        evaluate=lambda: f"held out {accuracy(run, model, held_out, options.batch_size):.3f}",
    )


def draw(run: Run, model: nn.Module, data: Digits, label: str) -> None:
    """Draws two pictures in the output folder. All processes compute: a sharded model needs all of them."""
    images = torch.stack([data.images[data.labels == digit][0] for digit in data.labels.unique()])
    cams = grad_cam(model, images).cpu().numpy()
    distances = {name: d.cpu() for name, d in mean_attention_distances(model, data.images[:64]).items()}
    if not run.main:
        return
    try:
        import matplotlib
    except ImportError:
        run.say("no pictures: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 10, figsize=(12, 2.6))
    for column, (image, cam) in enumerate(zip(images[:, 0].cpu().numpy(), cams)):
        for row in range(2):
            axes[row, column].imshow(image, cmap="gray")
            axes[row, column].axis("off")
        axes[1, column].imshow(cam, cmap="jet", alpha=0.5)
    figure.savefig(run.output / f"{label}_grad_cam.png", dpi=120, bbox_inches="tight")

    figure, axis = plt.subplots(figsize=(6, 4))
    for layer, heads in enumerate(distances.values()):
        axis.scatter([layer] * len(heads), heads.tolist(), color="tab:blue")
    axis.plot([heads.mean().item() for heads in distances.values()], color="tab:blue", alpha=0.5)
    axis.set_xticks(range(len(distances)), list(distances), rotation=45, ha="right")
    axis.set_ylabel("mean attention distance of each head (pixels)")
    figure.savefig(run.output / f"{label}_attention_distance.png", dpi=120, bbox_inches="tight")
    run.say(f"pictures: {run.output}/{label}_grad_cam.png and {label}_attention_distance.png")


def main(argv: Sequence[str] | None = None) -> float:
    parser = arguments(__doc__, output="runs/classify_vitae", epochs=15, batch_size=64, lr=3e-3)
    parser.add_argument("--model", choices=MODELS, default="vitae")
    options = parser.parse_args(argv)
    with Run(options) as run:
        data, held_out = (run.some(part) for part in load_digits(SIZE))
        net = MODELS[options.model]()
        model = run.parallel(net, [cell for stage in net.layers for cell in stage.NC])
        train(run, model, data, held_out, options)
        reached = accuracy(run, model, held_out, options.batch_size)
        run.say(f"held-out accuracy: {reached:.4f} of {len(held_out.labels)} digits")
        draw(run, net, held_out, options.model)
    return reached


if __name__ == "__main__":
    leave(0 if main() else 1)
