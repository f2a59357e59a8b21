# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_ms_deform_attn: vitkern's CPU kernels against every peer that is installed.

An implementation has a time only if its output and gradients were right in this run: on a small case against the
float64 oracle, and on the row's own inputs against grid_sample in float32. Times are minima over interleaved rounds;
ratios mean more than milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import arguments, machine
from benchmarks.peers import OURS, PEERS, Peer, yardstick_of
from vitkern.bench.measure import forward_backward, interleaved
from vitkern.cases import ATTENTION_CASES, MsDeformAttnInputs, make_inputs

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
COMPILED = "grid_sample compiled"  # takes a minute a row before it runs at all


def present() -> list[Peer]:
    """The peers that run here; for each other one, the reason is printed."""
    small = make_inputs(ATTENTION_CASES["hub-small"].with_batch(1), locations="uniform")
    peers = []
    for peer in PEERS.values():
        verdict = "not asked for" if peer.name == COMPILED else peer.verdict(small)
        if verdict == "right":
            peers.append(peer)
        else:
            print(f"{peer.name}: {verdict}")
    return peers


def inputs_of(name: str, locations: str, dtype: torch.dtype) -> MsDeformAttnInputs:
    return make_inputs(ATTENTION_CASES[name].with_batch(1), locations=locations, dtype=dtype)


@functools.lru_cache(maxsize=1)  # rows that differ in the pass alone share it
def expected(*case) -> list[Tensor]:
    return yardstick_of(inputs_of(*case))


def measure(case: tuple, what: str, peers: list[Peer], seconds: float) -> dict[str, str | float]:
    """Milliseconds of each implementation, or its verdict if that is not "right"."""
    inputs, yardstick = inputs_of(*case), expected(*case)
    results: dict[str, str | float] = {peer.name: peer.verdict(inputs, yardstick) for peer in (OURS, *peers)}
    tensors = inputs.requires_grad_().differentiable() if what == "both" else inputs.differentiable()

    def call(peer: Peer) -> Callable[[], object]:
        attention = peer.attention(inputs)
        return forward_backward(attention, tensors) if what == "both" else lambda: attention(*tensors)

    calls = {peer.name: call(peer) for peer in (OURS, *peers) if results[peer.name] == "right"}
    with torch.set_grad_enabled(what == "both"):
        samples = interleaved(calls, seconds=seconds)
    return results | {name: min(times) for name, times in samples.items()}


def main() -> None:
    given = arguments(__doc__.splitlines()[0], seconds=15.0)
    print(machine())
    peers = present()
    columns = "".join(f"{peer.name + ' ms':>26}{'ratio':>8}" for peer in peers)
    print(f"{'case':<17}{'locations':<11}{'dtype':<10}{'pass':<9}{'vitkern ms':>12}{columns}")
    for name, locations, dtype, what in ROWS:
        label = f"{name:<17}{locations:<11}{str(dtype)[6:]:<10}{what:<9}"
        if given.match not in label:
            continue
        ours, *theirs = measure((name, locations, dtype), what, peers, given.seconds).values()
        if isinstance(ours, str):
            print(f"{label}  {ours}: not timed")
            continue
        cells = [
            f"{time[:33]:>34}" if isinstance(time, str) else f"{time:>26.2f}{time / ours:>7.1f}x"
            for time in theirs
        ]
        print(f"{label}{ours:>12.2f}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
