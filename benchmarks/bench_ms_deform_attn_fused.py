# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_ms_deform_attn_fused: all between the Linears of MSDeformAttn, fused against unfused.

"usual": softmax and ``ref + off / size`` in their usual form, then our plain op. "flat": the best unfused form,
one ``addcmul`` over a flat last axis. Times are minima over interleaved rounds; a row is timed only if all agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import vitkern
from benchmarks.harness import arguments, machine
from vitkern.bench.measure import forward_backward, interleaved
from vitkern.cases import ATTENTION_CASES, MsDeformAttnCase, locations_of
from vitkern.cases.attention_ops import near_fused_inputs

NAMES = ("detr-encoder", "detr-decoder", "injector-B512", "extractor-B512", "rtdetr-decoder", "m2f-512")


def fused(tables: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    return lambda value, reference, offsets, logits: vitkern.ms_deform_attn_fused(
        value, *tables, reference, offsets, logits
    )


def usual(tables: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    def run(value, reference, offsets, logits):
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        return vitkern.ms_deform_attn(value, *tables, locations_of(reference, offsets, tables[0]), weights)

    return run


def flat(tables: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    def run(value, reference, offsets, logits):
        batch, queries, heads, levels, points, _ = offsets.shape
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        step = (1 / tables[0].flip(-1)).to(offsets.dtype)[:, None].expand(-1, points, -1).reshape(-1)
        start = reference[:, :, :, None].expand(-1, -1, -1, points, -1).reshape(batch, queries, 1, -1)
        locations = torch.addcmul(start, offsets.flatten(3), step).view(offsets.shape)
        return vitkern.ms_deform_attn(value, *tables, locations, weights)

    return run


def agree(variants: dict[str, Callable[..., Tensor]], tensors: tuple[Tensor, ...]) -> bool:
    outputs = [run(*tensors).float() for run in variants.values()]
    limit = (1e-4 if tensors[0].dtype == torch.float32 else 3e-2) * outputs[0].abs().max()
    return all((output - outputs[0]).abs().max() <= limit for output in outputs[1:])


def main() -> None:
    given = arguments(__doc__.splitlines()[0], seconds=6.0)
    print(machine())
    print(
        f"{'case':<17}{'dtype':<10}{'pass':<9}{'usual ms':>10}{'flat ms':>10}{'fused ms':>10}{'ratios':>15}"
    )
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            for what in ("forward", "both"):
                label = f"{name:<17}{str(dtype)[6:]:<10}{what:<9}"
                if given.match in label:
                    print(
                        label + measure(ATTENTION_CASES[name].with_batch(1), dtype, what, given.seconds),
                        flush=True,
                    )


def measure(case: MsDeformAttnCase, dtype: torch.dtype, what: str, seconds: float) -> str:
    tensors, tables = near_fused_inputs(case, dtype)
    variants = {"usual": usual(tables), "flat": flat(tables), "fused": fused(tables)}
    if not agree(variants, tensors):
        return "  results differ: not timed"
    backward = what == "both"
    for tensor in (tensors[0], *tensors[2:]):  # reference points of an encoder are no parameters
        tensor.requires_grad_(backward)
    if backward:
        runs = {name: forward_backward(run, tensors) for name, run in variants.items()}
    else:
        runs = {name: lambda run=run: run(*tensors) for name, run in variants.items()}
    with torch.set_grad_enabled(backward):
        best = {name: min(times) for name, times in interleaved(runs, seconds=seconds).items()}
    ratios = f"{best['usual'] / best['fused']:.2f}x {best['flat'] / best['fused']:.2f}x"
    return "".join(f"{best[name]:>10.2f}" for name in variants) + f"{ratios:>15}"


if __name__ == "__main__":
    main()
