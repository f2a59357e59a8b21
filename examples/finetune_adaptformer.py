# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer on handwritten digits: a transformer trained on 0 to 4 is tuned to 5 to 9.

A small vision transformer is trained on the digits 0 to 4. Then it is frozen, adapters are added beside its
feed-forward networks, and only the adapters and a new classifier are trained on 5 to 9.

    python examples/finetune_adaptformer.py                        # about a minute on two cores
    torchrun --nproc-per-node 2 examples/finetune_adaptformer.py   # with --fsdp: parameters are shared out too

After a kill, start it again: it resumes from the last epoch. Needs ``pip install ".[examples]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Run, arguments, fit, leave
from digits import Digits, accuracy, augment, load_digits
from vitkern.models import AdaptFormer, freeze_backbone, load_checkpoint

SIZE = 16
MODEL = dict(img_size=SIZE, patch_size=4, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=5)
TUNING = dict(ffn_num=16, ffn_option="parallel", ffn_adapter_scalar=1.0)


def five(data: Digits, first: int) -> Digits:
    """The digits `first` to `first` + 4 as classes 0 to 4."""
    chosen = (data.labels >= first) & (data.labels < first + 5)
    return Digits(data.images[chosen], data.labels[chosen] - first)


def train(run: Run, network: AdaptFormer, label: str, first: int, epochs: int, lr: float, size: int) -> float:
    """Trains on five digits from `first` on, in batches of `size`; returns the held-out accuracy."""
    data, held_out = (run.some(five(part, first)) for part in load_digits(SIZE))
    model = run.parallel(network, network.blocks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(augment(data.images[batch])), data.labels[batch])

    fit(
        run,
        model,
        optimizer,
        loss,
        label=label,
        samples=len(data.labels),
        batch_size=size,
        epochs=epochs,
        lr=lr,
        evaluate=lambda: f"held out {accuracy(run, model, held_out, size):.3f}",
        warmup_epochs=3,
    )
    return accuracy(run, model, held_out, size)


def pretrained(run: Run, options: argparse.Namespace) -> None:
    """Trains a transformer on 0 to 4 and writes pretrained.pt."""
    network = AdaptFormer(**MODEL)
    nn.init.normal_(network.pos_embed, std=0.2)  # with 16 patches of a few strokes, positions matter
    reached = train(
        run, network, "pretrained", 0, options.pretrain_epochs, options.pretrain_lr, options.batch_size
    )
    run.say(f"digits 0 to 4, all parameters trained: held-out accuracy {reached:.4f}")


def adapted(run: Run, options: argparse.Namespace) -> float:
    """Tunes the adapters; returns the accuracy on 5 to 9."""
    network = AdaptFormer(**MODEL, tuning_config=TUNING)
    loaded = load_checkpoint(network, run.output / "pretrained.pt")
    network.reset_classifier(MODEL["num_classes"])
    freeze_backbone(network, loaded)
    counts = {p: p.numel() for p in network.parameters()}
    trained = sum(count for p, count in counts.items() if p.requires_grad)
    reached = train(run, network, "adapted", 5, options.epochs, options.lr, options.batch_size)
    run.say(
        f"digits 5 to 9, {trained} of {sum(counts.values())} parameters trained "
        f"({trained / sum(counts.values()):.1%}): held-out accuracy {reached:.4f}"
    )
    return reached


def main(argv: Sequence[str] | None = None) -> float:
    parser = arguments(__doc__, output="runs/finetune_adaptformer", epochs=40, batch_size=64, lr=5e-3)
    parser.add_argument("--pretrain-epochs", type=int, default=40)
    parser.add_argument("--pretrain-lr", type=float, default=2e-3)
    options = parser.parse_args(argv)
    with Run(options) as run:
        pretrained(run, options)
        return adapted(run, options)


if __name__ == "__main__":
    leave(0 if main() else 1)
