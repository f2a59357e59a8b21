# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer on scikit-learn's handwritten digits: a transformer that knows 0 to 4 learns 5 to 9.

A small vision transformer is trained on the digits 0 to 4. Then all of it is frozen, adapters are put beside its
feed-forward networks, and they and a new classifier alone are trained on 5 to 9.

    python examples/finetune_adaptformer.py                     again after a kill: goes on from its last epoch
    torchrun --nproc-per-node 2 examples/finetune_adaptformer.py --fsdp

Needs ``pip install vitkern[examples]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Run, arguments, fit
from vitkern.models import AdaptFormer, freeze_backbone, load_checkpoint

MODEL = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=6, num_heads=4, num_classes=5)
TUNING = dict(ffn_num=16, ffn_option="parallel", ffn_adapter_scalar=0.5)
HELD_OUT = 0.3
SPLIT_SEED = 0


class Digits:
    """Images [N, 1, 8, 8] and labels 0 to 4 of five digits, 70 % to train with and 30 % held out."""

    def __init__(self, first: int, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = (digits.target >= first) & (digits.target < first + 5)
        images = torch.from_numpy(digits.images[chosen]).float()[:, None] / 8 - 1  # -1 to 1
        labels = torch.from_numpy(digits.target[chosen]).long() - first
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held_out, train = order.split(
            [round(HELD_OUT * len(order)), len(order) - round(HELD_OUT * len(order))]
        )
        self.train = images[train].to(device), labels[train].to(device)
        self.held_out = images[held_out].to(device), labels[held_out].to(device)


def warped(images: Tensor) -> Tensor:
    """Each turned by up to 15 degrees, scaled by up to 15 % each way, and moved by up to a pixel."""
    count, device = len(images), images.device

    def between(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device) * (high - low) + low

    angle, wide, high = between(-math.pi / 12, math.pi / 12), between(0.85, 1.15), between(0.85, 1.15)
    rows = [
        torch.stack([wide * angle.cos(), -wide * angle.sin(), between(-0.25, 0.25)], dim=1),
        torch.stack([high * angle.sin(), high * angle.cos(), between(-0.25, 0.25)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # nothing is drawn outside


def train(
    run: Run, network: AdaptFormer, digits: Digits, *, label: str, epochs: int, lr: float, batch_size: int
) -> float:
    """The accuracy on what was held out."""
    model: nn.Module = run.parallel(network, network.blocks)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)

    def loss(batch: Tensor) -> Tensor:
        images, labels = (part[batch] for part in digits.train)
        return F.cross_entropy(model(warped(images)), labels, label_smoothing=0.1)

    def accuracy() -> float:
        images, labels = digits.held_out
        right = torch.zeros((), device=run.device)
        for batch in run.batches(len(labels), batch_size):
            right += (model(images[batch]).argmax(dim=1) == labels[batch]).sum()
        return run.sum(right).item() / len(labels)

    fit(
        run,
        model,
        optimizer,
        loss,
        label=label,
        samples=len(digits.train[1]),
        batch_size=batch_size,
        epochs=epochs,
        lr=lr,
        evaluate=lambda: f"held-out accuracy {accuracy():.1%}",
        warmup_epochs=3,
    )
    with torch.no_grad():
        return accuracy()


def main(argv: Sequence[str] | None = None) -> float:
    parser = arguments(__doc__, output="build/adaptformer", epochs=60, batch_size=64, lr=5e-3)
    parser.add_argument("--pretrain-epochs", type=int, default=60)
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    options = parser.parse_args(argv)
    with Run(options) as run:
        first, second = Digits(0, run.device), Digits(5, run.device)
        network = AdaptFormer(**MODEL)
        known = train(
            run,
            network,
            first,
            label="pretrained",
            epochs=options.pretrain_epochs,
            lr=options.pretrain_lr,
            batch_size=options.batch_size,
        )
        run.say(f"digits 0 to 4: {known:.1%} of the held-out ones are right")

        network = AdaptFormer(**MODEL, tuning_config=TUNING)
        loaded = load_checkpoint(network, run.output / "pretrained.pt")
        network.reset_classifier(MODEL["num_classes"])
        freeze_backbone(network, loaded)
        parameters = list(network.parameters())
        tuned = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
        result = train(
            run,
            network,
            second,
            label="adapted",
            epochs=options.epochs,
            lr=options.lr,
            batch_size=options.batch_size,
        )
        run.say(
            f"digits 5 to 9: {result:.1%} of the held-out ones are right, {tuned:.1%} of the parameters trained"
        )
        return result


if __name__ == "__main__":
    main()
