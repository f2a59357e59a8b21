# SPDX-License-Identifier: Apache-2.0
"""`vitkern demo`: an encoder layer of Deformable-DETR, checked against plain torch and timed against it.

The plain side is the usual code without a kernel: one ``grid_sample`` per level, then the weighted sum. A time is
printed only if output and gradients of the two sides have agreed in this run. Where torch sees a card, the same
attention runs there (demo_card.py). A picture shows where queries sample.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitkern
from vitkern.cases import pixel_centres
from vitkern.commands.arguments import positive
from vitkern.commands.doctor import cpu_model
from vitkern.commands.outputs import prove_folder
from vitkern.reference import ms_deform_attn_by_grid_sample

CHANNELS, HEADS, LEVELS, POINTS = 256, 8, 4, 4
STRIDES = (8, 16, 32, 64)
IMAGES = ((256, 256), (512, 512), (800, 1333))  # height, width

# The sides round and sum float32 in different orders, so outputs differ by 1e-6. The gradient of a location jumps where
# it crosses a pixel centre's row or column: of millions of locations some dozens lie so close to one that the sides
# round to different cells, both rightly, and gradients differ by up to 5e-3. Wrong maths gives 1e-1 and more in both.
TOLERANCE = {"forward": 1e-5, "forward + backward": 1e-2}
SECONDS_OF_TIMING = 2.5  # for a row of the table, and two rounds in any case


class PlainMSDeformAttn(vitkern.nn.MSDeformAttn):
    """The same module in plain torch."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        reference: Tensor,
        features: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
    ) -> Tensor:
        points = (*query.shape[:2], HEADS, LEVELS, POINTS)
        value = self.value_proj(features).unflatten(-1, (HEADS, -1))
        offsets = self.sampling_offsets(query).view(*points, 2)
        weights = self.attention_weights(query).view(*points[:3], -1).softmax(-1).view(points)
        locations = reference[:, :, None, :, None] + offsets / spatial_shapes.flip(-1)[:, None]
        sizes = [(height, width) for height, width in spatial_shapes.tolist()]
        return self.output_proj(ms_deform_attn_by_grid_sample(value, sizes, locations, weights))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual and a LayerNorm after it."""

    def __init__(self, attention: vitkern.nn.MSDeformAttn, feedforward: int = 1024) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.widen, self.narrow = nn.Linear(CHANNELS, feedforward), nn.Linear(feedforward, CHANNELS)

    def forward(
        self, features: Tensor, position: Tensor, reference: Tensor, shapes: Tensor, starts: Tensor
    ) -> Tensor:
        features = self.norm1(
            features + self.attention(features + position, reference, features, shapes, starts)
        )
        return self.norm2(features + self.narrow(F.relu(self.widen(features))))


@dataclass
class Comparison:
    """One function in two versions, with inputs that both take and the parameters that they share by value."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    parameters: tuple[list[Tensor], list[Tensor]] = ((), ())  # type: ignore[assignment]

    def runs(self, backward: bool) -> list[Callable[[], list[Tensor]]]:
        """A call without arguments for each side: the output, and with `backward` all gradients."""
        inputs = [tensor.detach().requires_grad_(backward) for tensor in self.inputs]
        with torch.no_grad():
            towards = torch.randn_like(self.ours(*inputs))

        def run(side: Callable[..., Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                output = side(*inputs)
            return (
                [output, *torch.autograd.grad(output, [*inputs, *parameters], towards)]
                if backward
                else [output]
            )

        return [lambda: run(self.ours, self.parameters[0]), lambda: run(self.plain, self.parameters[1])]


def pyramid(image: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Height and width of each level of features, and its first pixel."""
    shapes = torch.tensor([[math.ceil(side / stride) for side in image] for stride in STRIDES])
    return shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)


def comparisons(image: tuple[int, int]) -> list[Comparison]:
    """The attention alone and in its layer, over the feature pyramid of an image of this size."""
    torch.manual_seed(0)
    shapes, starts = pyramid(image)
    # Every pixel of every level is a query with the same reference point on each level: [1, S, L, 2].
    reference = pixel_centres(shapes.tolist()).float()[None, :, None].expand(-1, -1, LEVELS, -1)
    queries = reference.shape[1]

    ours = EncoderLayer(vitkern.nn.MSDeformAttn(CHANNELS, LEVELS, HEADS, POINTS))
    # As after some training: sampling points and attention weights depend on the query.
    nn.init.normal_(ours.attention.sampling_offsets.weight, std=0.05)
    nn.init.normal_(ours.attention.attention_weights.weight, std=0.05)
    plain = EncoderLayer(PlainMSDeformAttn(CHANNELS, LEVELS, HEADS, POINTS))
    plain.load_state_dict(ours.state_dict())

    features, position = torch.randn(1, queries, CHANNELS), torch.randn(1, queries, CHANNELS)
    value = torch.randn(1, queries, HEADS, CHANNELS // HEADS)
    weights = torch.randn(1, queries, HEADS, LEVELS * POINTS).softmax(-1).unflatten(-1, (LEVELS, POINTS))
    with torch.no_grad():
        offsets = ours.attention.sampling_offsets(features).view(1, queries, HEADS, LEVELS, POINTS, 2)
    locations = reference[:, :, None, :, None] + offsets / shapes.flip(-1)[:, None]
    sizes = [(height, width) for height, width in shapes.tolist()]
    return [
        Comparison(
            "attention",
            lambda value, locations, weights: vitkern.ms_deform_attn(
                value, shapes, starts, locations, weights
            ),
            lambda value, locations, weights: ms_deform_attn_by_grid_sample(value, sizes, locations, weights),
            [value, locations, weights],
        ),
        Comparison(
            "layer",
            lambda features, position: ours(features, position, reference, shapes, starts),
            lambda features, position: plain(features, position, reference, shapes, starts),
            [features, position],
            (list(ours.parameters()), list(plain.parameters())),
        ),
    ]


def difference(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """The largest relative difference among pairs of tensors, in the 2-norm."""
    with torch.no_grad():
        return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, plain))


def time_in_turn(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The best time of each over several rounds, in milliseconds. They take turns: a slow moment affects both."""
    best = [math.inf] * len(runs)
    deadline = time.perf_counter() + SECONDS_OF_TIMING
    for done in range(100):
        for side, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[side] = min(best[side], 1e3 * (time.perf_counter() - started))
        if done >= 1 and time.perf_counter() > deadline:
            break
    return best


def table(images: Sequence[tuple[int, int]]) -> bool:
    """Prints check and times row by row; returns whether every check passed."""
    heading = (
        f"{'image':<11}{'queries':>7}  {'what':<10}{'pass':<19}{'torch ms':>10}{'vitkern ms':>12}{'ratio':>8}"
    )
    print(f"{heading}   equal to within")
    passed = True
    for image in images:
        for comparison in comparisons(image):
            for backward in (False, True):
                runs = comparison.runs(backward)
                apart = difference(*(run() for run in runs))
                queries = comparison.inputs[0].shape[1]
                what = "forward + backward" if backward else "forward"
                print(f"{image[0]}x{image[1]:<7}{queries:>7}  {comparison.name:<10}{what:<19}", end="")
                if not apart <= TOLERANCE[what]:
                    passed = False
                    print(f"   FAILED: the two differ by {apart:.1e}")
                    continue
                ours, plain = time_in_turn(runs)
                print(f"{plain:>10.1f}{ours:>12.1f}{plain / ours:>7.1f}x   {apart:.0e}", flush=True)
    return passed


def main(*, output: Path, threads: int | None = None, quick: bool = False) -> int:
    positive("--threads", threads)
    prove_folder(output)
    if threads is not None:
        torch.set_num_threads(threads)
    images = IMAGES[:1] if quick else IMAGES
    print(
        "\nAn encoder layer of Deformable-DETR, random weights, batch 1, against plain torch (grid_sample)."
    )
    print(
        f"\nOn {cpu_model()}, {torch.get_num_threads()} threads, {vitkern._C.cpu_isa()} kernels, float32:\n"
    )
    passed = table(images)
    print(
        "\nThe best of several rounds taken in turn. 'Equal to within' is the relative difference in the 2-norm,"
    )
    print("the largest over the output and, with backward, the gradients of all inputs and parameters.\n")
    passed &= _on_the_card(images)
    if importlib.util.find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed (pip install matplotlib)")
    else:
        from vitkern.commands.demo_picture import draw

        print(f"Where queries sample: {draw(output)}")
    return 0 if passed else 1


def _on_the_card(images: Sequence[tuple[int, int]]) -> bool:
    """Prints the card's table, or a line that there is no card; returns whether all kernels were right."""
    from vitkern.commands import demo_card

    found = demo_card.card()
    if found is None:
        print(
            "No card: torch sees none here, so nothing of CUDA and Triton is shown (`vitkern doctor`: why).\n"
        )
        return True
    device, clock = found
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"The attention alone on {name}:\n")
    passed = demo_card.table(images, device, clock)
    print(
        "\nMedians of calls between events, queued ahead; ratios are to grid_sample as it is. Memory is the most"
    )
    print("that a call adds.\n")
    return passed
