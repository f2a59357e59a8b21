# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_vit_adapter: a training step of ViT-Adapter at 512 px with several forms of attention.

"grid_sample": the form that runs if no kernel is built. "free": an op that costs nothing and has zero gradients; only
the dense layers remain, so no kernel can be faster. A model is timed only if its maps agreed. Times are minima over
interleaved rounds. MB: the most memory that a step adds to the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import vitkern
from benchmarks.harness import arguments, machine
from vitkern import reference
from vitkern.bench.measure import interleaved, peak_megabytes

NAMES = ("vit_adapter_tiny", "vit_adapter_base")
SIZE = 512  # pixels


def by_grid_sample(value, sizes, starts, points, offsets, logits, *, backend) -> Tensor:
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    locations = points[:, :, None, :, None] + offsets / sizes.flip(-1)[:, None]
    return reference.ms_deform_attn_by_grid_sample(value, sizes, locations, weights)


class Free(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, offsets, logits):
        ctx.shapes = [tensor.shape for tensor in (value, offsets, logits)]
        batch, _, heads, channels = value.shape
        return value.new_zeros(1).expand(batch, offsets.shape[1], heads * channels)

    @staticmethod
    def backward(ctx, grad_output):
        return tuple(grad_output.new_zeros(1).expand(shape) for shape in ctx.shapes)


def free(value, sizes, starts, points, offsets, logits, *, backend) -> Tensor:
    return Free.apply(value, offsets, logits)


ATTENTIONS = {"vitkern": vitkern.ms_deform_attn_fused, "grid_sample": by_grid_sample, "free": free}


def on(attention: Callable[..., Tensor], run: Callable[[], object]) -> Callable[[], object]:
    """A function that calls `run` with this attention in all layers."""

    def running():
        with mock.patch("vitkern.nn.ms_deform_attn.ms_deform_attn_fused", attention):
            return run()

    return running


def step(model: nn.Module, image: Tensor) -> None:
    """Forward and backward, without an optimizer, whose time is the same for all forms."""
    model.zero_grad(set_to_none=True)
    sum(features.square().mean() for features in model(image)).backward()


def agree(model: nn.Module, image: Tensor) -> bool:
    model.eval()
    with torch.no_grad():
        ours, theirs = (on(ATTENTIONS[name], lambda: model(image))() for name in ("vitkern", "grid_sample"))
    model.train()
    return all((a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(ours, theirs))


def measure(name: str, image: Tensor, seconds: float) -> str:
    torch.manual_seed(0)
    model = vitkern.create_model(name, img_size=SIZE, drop_path_rate=0.0)
    if not agree(model, image):
        return "  maps differ: not timed"
    runs = {name: on(attention, partial(step, model, image)) for name, attention in ATTENTIONS.items()}
    best = {name: min(times) for name, times in interleaved(runs, seconds=seconds).items()}
    peak = {name: peak_megabytes(runs[name]) for name in ("vitkern", "grid_sample")}
    times = "".join(f"{best[name]:>16.0f}" for name in ATTENTIONS)
    ratios = "".join(f"{best['grid_sample'] / best[name]:>8.2f}x" for name in ("vitkern", "free"))
    return f"{times}{ratios}{peak['vitkern']:>12.0f}{peak['grid_sample']:>16.0f}"


def main() -> None:
    given = arguments(__doc__.splitlines()[0], seconds=60.0)
    print(f"{machine()}, {SIZE} px, batch 1, float32")
    columns = "".join(f"{name:>13} ms" for name in ATTENTIONS)
    print(f"{'model':<18}{columns}{'ratio':>9}{'free':>9}{'vitkern MB':>12}{'grid_sample MB':>16}")
    image = torch.randn(1, 3, SIZE, SIZE)
    for name in NAMES:
        if given.match in name:
            print(f"{name:<18}{measure(name, image, given.seconds)}", flush=True)


if __name__ == "__main__":
    main()
