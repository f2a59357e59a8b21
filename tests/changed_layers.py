# SPDX-License-Identifier: Apache-2.0
"""Changed copies of the layers of other projects, made from their source text: tests/layers_to_change.

tests/changes.py has changes of the result, tests/rewordings.py changes of the wording only.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import re
import sys
import types
from string import Template
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.layers_to_change import Base

Swap = (
    tuple[str, str] | tuple[str, str, int]
)  # a snippet, what takes its place, and how often it stands there: once


class Inputs(NamedTuple):
    """The inputs of a call whose result shows a change, and the settings of the model, made after it was patched."""

    batch: int = 2
    queries: int = 7
    sizes: tuple[tuple[int, int], ...] = ((6, 5), (3, 2))  # of levels, as (height, width)
    last: int = 2  # numbers in a reference point
    masked: bool = False
    magnitude: float = 1.0  # of the pixels
    calls: int = 1
    dtype: torch.dtype = torch.float32
    training: bool = False
    graded: bool = True  # whether gradients are recorded
    attributes: tuple[tuple[str, object], ...] = ()  # set on every layer


class Row(NamedTuple):
    """A change, written in Deformable-DETR's names, which `Base.words` translates."""

    name: str
    swaps: tuple[Swap, ...] = ()
    shown: Inputs = Inputs()
    appended: str = ""  # at the end of the module
    kind: str = ""  # the class, if it is an appended one
    silent: bool = False  # no output on a CPU shows it
    core: bool = False  # it is in the core


AS_IT_IS, PLAIN = Row("as it is"), Inputs()


def changed(base: Base, row: Row = AS_IT_IS) -> type[nn.Module]:
    """The class of a changed layer, in a module of its own."""
    return getattr(module_of(base, row), _translated(base, row.kind) or base.kind)


class SnippetNotFoundError(LookupError):
    """The text does not have the snippet as often as expected."""


def text_of(base: Base, row: Row) -> str:
    text = base.text
    for snippet, other, *count in row.swaps:
        snippet, other = _translated(base, snippet), _translated(base, other)
        if text.count(snippet) != (expected := count[0] if count else 1):
            raise SnippetNotFoundError(
                f"{base.name} has {text.count(snippet)} times, not {expected} times: {snippet}"
            )
        text = text.replace(snippet, other)
    return f"{text}\n\n{_translated(base, row.appended)}\n"


_numbers = itertools.count()


def module_of(base: Base, row: Row) -> types.ModuleType:
    """A new module each time. It is registered, so that classes can be pickled and lines of code shown."""
    text = text_of(base, row)
    name = f"changed_layer_{next(_numbers)}"
    module = types.ModuleType(name)
    module.__file__ = file = f"<{name}: {base.name}, {row.name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    sys.modules[name] = module
    exec(compile(text, file, "exec"), vars(module))
    return module


def _translated(base: Base, text: str) -> str:
    text = Template(text).substitute(base.phrases)
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda word: base.words.get(word[0], word[0]), text)


class Model(nn.Module):
    """Two layers; the query of the second includes the result of the first. The weights are always the same."""

    def __init__(self, base: Base, kind: type[nn.Module]) -> None:
        super().__init__()
        self.call = base.call
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(kind(**base.arguments) for _ in range(2))
            for layer in self.layers:
                nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
                for part in (layer.attention_weights, layer.value_proj, layer.output_proj):
                    nn.init.normal_(part.weight, std=0.2)
                    nn.init.normal_(part.bias, std=0.2)
        self.eval()

    def forward(self, query: Tensor, *others: Tensor | None) -> list[Tensor]:
        found: list[Tensor] = []
        for layer in self.layers:
            output = self.call(layer, query, *others)
            found += output if isinstance(output, tuple) else [output]
            query = (query + (output[0] if isinstance(output, tuple) else output)) / 2
        return found


def tensors_of(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The arguments of a call: query, pixels, points, shapes, starts, mask."""
    draw = functools.partial(torch.rand, generator=torch.Generator().manual_seed(1))
    counts = [height * width for height, width in inputs.sizes]
    query = draw(inputs.batch, inputs.queries, 32)
    pixels = draw(inputs.batch, sum(counts), 32) * inputs.magnitude
    points = draw(inputs.batch, inputs.queries, len(counts), inputs.last)
    mask = (torch.arange(sum(counts)) % 5 == 0).expand(inputs.batch, -1) if inputs.masked else None
    starts = torch.tensor([0, *itertools.accumulate(counts[:-1])])
    floats = (tensor.to(inputs.dtype) for tensor in (query, pixels, points))
    return *floats, torch.tensor(inputs.sizes), starts, mask


def results(model: Model, inputs: Inputs) -> list[Tensor | None]:
    """Outputs and gradients of all calls in order; None for a missing gradient."""
    model.to(inputs.dtype).train(inputs.training)
    for layer in model.layers:
        for name, value in inputs.attributes:
            setattr(layer, name, value)
    found: list[Tensor | None] = []
    for _ in range(inputs.calls):
        torch.manual_seed(2)
        floats, others = tensors_of(inputs)[:3], tensors_of(inputs)[3:]
        if not inputs.graded:
            with torch.no_grad():
                found += model(*floats, *others)
            continue
        leaves = [tensor.requires_grad_() for tensor in floats]
        outputs = model(*leaves, *others)
        loss = sum(output.float().square().mean() for output in outputs)
        found += [output.detach() for output in outputs]
        leaves += [parameter for parameter in model.parameters() if parameter.requires_grad]
        found += torch.autograd.grad(loss, leaves, allow_unused=True)
    return found


def equal(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    """Whether all tensors are bitwise equal."""
    return len(found) == len(expected) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(found, expected)
    )


def distance(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest difference of two tensors over the largest number in the second; inf if a tensor is missing."""
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected):
        if a is None or b is None:
            worst = max(worst, 0.0 if a is b else float("inf"))
            continue
        step = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        worst = max(worst, step if step == step else float("inf"))
    return worst
