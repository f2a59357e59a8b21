# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_ms_deform_attn: vitkern's CPU kernels against the grid_sample formulation.

A ratio is printed only if outputs and gradients of the two agreed in this run. Times are minima over interleaved
rounds; look at ratios, not at milliseconds.
"""

from __future__ import annotations

import functools

import torch

import vitkern
from benchmarks.cases import CASES, MsDeformAttnInputs, make_inputs
from benchmarks.harness import arguments, forward_backward, interleaved, machine
from vitkern.reference import ms_deform_attn_by_grid_sample

# (case, locations, dtype, pass): one row each. Batch 1 throughout.
ROWS = [
    ("detr-encoder", "uniform", torch.float32, "forward"),
    ("detr-encoder", "near", torch.float32, "forward"),
    ("detr-encoder", "uniform", torch.float32, "both"),
    ("detr-encoder", "near", torch.float32, "both"),
    ("detr-encoder", "uniform", torch.bfloat16, "forward"),
    ("detr-encoder", "near", torch.bfloat16, "forward"),
    ("detr-decoder", "near", torch.float32, "forward"),
    ("injector-B512", "near", torch.float32, "forward"),
    ("injector-B512", "near", torch.float32, "both"),
    ("extractor-B512", "near", torch.float32, "forward"),
    ("extractor-B512", "near", torch.float32, "both"),
    ("injector-B512", "near", torch.bfloat16, "forward"),
    ("extractor-B512", "near", torch.bfloat16, "forward"),
]


def ours(inputs: MsDeformAttnInputs):
    return lambda value, locations, weights: vitkern.ms_deform_attn(
        value, inputs.spatial_shapes, inputs.level_start_index, locations, weights
    )


def yardstick(inputs: MsDeformAttnInputs):
    sizes = [tuple(size) for size in inputs.spatial_shapes.tolist()]
    return lambda value, locations, weights: ms_deform_attn_by_grid_sample(value, sizes, locations, weights)


def agree(inputs: MsDeformAttnInputs) -> bool:
    """Whether output and gradients are those of the yardstick in float32, as far as the dtype can tell."""
    tolerance = 1e-4 if inputs.value.dtype == torch.float32 else 1e-2
    exact = inputs.to(torch.float32).requires_grad_()
    rounded = inputs.to(inputs.value.dtype).requires_grad_()
    results = []
    for function, tensors in (
        (ours(rounded), rounded.differentiable()),
        (yardstick(exact), exact.differentiable()),
    ):
        output = function(*tensors)
        # Not of the locations: their gradient jumps at the edge of a pixel, where the two may round apart.
        results.append([output, *torch.autograd.grad(output.sum(), tensors[::2])])
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(*results))


def measure(name: str, locations: str, dtype: torch.dtype, what: str, seconds: float):
    inputs = make_inputs(CASES[name].with_batch(1), locations=locations, dtype=dtype)
    if not agree(inputs):
        return None
    if what == "both":
        inputs.requires_grad_()
        wrap = functools.partial(forward_backward, inputs=inputs.differentiable())
    else:

        def wrap(function):
            return lambda: function(*inputs.differentiable())

    with torch.set_grad_enabled(what == "both"):
        samples = interleaved(
            {"vitkern": wrap(ours(inputs)), "grid_sample": wrap(yardstick(inputs))}, seconds=seconds
        )
    return {name: min(times) for name, times in samples.items()}


def main() -> None:
    given = arguments(__doc__.splitlines()[0], seconds=15.0)
    print(machine())
    print(
        f"{'case':<17}{'locations':<11}{'dtype':<10}{'pass':<9}{'grid_sample ms':>15}{'vitkern ms':>12}{'ratio':>8}"
    )
    for name, locations, dtype, what in ROWS:
        label = f"{name:<17}{locations:<11}{str(dtype)[6:]:<10}{what:<9}"
        if given.match not in label:
            continue
        best = measure(name, locations, dtype, what, given.seconds)
        if best is None:
            print(f"{label}  results differ: not timed")
            continue
        ratio = best["grid_sample"] / best["vitkern"]
        print(f"{label}{best['grid_sample']:>15.2f}{best['vitkern']:>12.2f}{ratio:>7.1f}x", flush=True)


if __name__ == "__main__":
    main()
