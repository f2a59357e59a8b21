# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of patched layers: a model of one layer, comparisons of its results, kernels in its graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def model_of(kind: type[nn.Module]) -> nn.Sequential:
    """A layer with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(kind())


def near(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def kernels_in(model: nn.Sequential, given: tuple) -> int:
    """The number of nodes of the op in the layer's single graph."""
    counts = []

    def backend(graph, _):
        counts.append(sum("ms_deform_attn" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    with torch.no_grad():
        torch.compile(model[0], fullgraph=True, backend=backend)(*given)
    torch._dynamo.reset()
    return sum(counts)
