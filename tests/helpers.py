# SPDX-License-Identifier: Apache-2.0
"""Comparisons that a wrong kernel cannot pass. tests/test_helpers.py shows the mistake that each one catches."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.parity.weights import seeded
from vitkern.cases import Case, results
from vitkern.cases.ops import OPS
from vitkern.cases.record import Setting, as_it_is
from vitkern.check import compare
from vitkern.check.examine import Expected, Outcome
from vitkern.check.examine import compare as compare_results
from vitkern.check.examine import deterministic as reproducible
from vitkern.ops import ms_deform_attn
from vitkern.ops.ms_deform_attn_checks import Fused, Plain
from vitkern.ops.plan import Plan

gradients = results  # by the name that tests use: [output, *gradient of each input]


def of_cards(cards: Iterable[int], what: str) -> list:
    """Parameters of an expensive fixture: one worker of pytest-xdist runs all tests of a card, so it is made once."""
    return [pytest.param(card, marks=pytest.mark.xdist_group(f"{what} for sm_{card}")) for card in cards]


def image(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return seeded("image", (batch, 3, height, width))


def close(actual: object, expected: object, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def loss_of(output: Tensor | list[Tensor]) -> Tensor:
    """A weighted sum of all outputs of a model, with a different weight for each number."""
    outputs = output if isinstance(output, list) else [output]
    return sum((m.float() * seeded(str(i), m.shape)).mean() for i, m in enumerate(outputs))


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_of(model: torch.nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The gradient of every trainable parameter."""
    model.zero_grad()
    loss_of(model(*inputs)).backward()
    return {key: parameter.grad.clone() for key, parameter in trained(model).items()}


def run_in_two_processes(example: str, *arguments: object) -> str:
    """Starts an example of this package by torchrun and returns its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, example, "--device", "cpu", "--threads", "1", *map(str, arguments)],
        cwd=Path(__file__).parent.parent / "examples",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Stricter than `vitkern check`, which has to pass with any seed: sums are made in float32 and float64, so another order
# of the terms changes the result by some units.
UNITS = {**compare.UNITS, torch.float32: 8}


def assert_as_exact_as(
    actual: Tensor,
    plain: Tensor,
    oracle: Tensor,
    *,
    what: str,
    units: dict[torch.dtype, int] = UNITS,
    extra_tolerance: float = 0.0,
) -> None:
    """`actual`'s error against the float64 oracle is at most twice that of plain torch in the same dtype."""
    verdict = compare.judge(actual, plain, oracle, units=units, extra_tolerance=extra_tolerance)
    assert verdict.complaint is None, f"{what} {verdict.complaint}"


def assert_right(
    op: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "cpu",
    device: str = "cpu",
    seed: int = 0,
    layout: Callable[[Tensor], Tensor] = as_it_is,
    **options,
) -> None:
    """Checks output and each gradient of an op on a case by the rules of `vitkern check`."""
    setting = Setting(case.name, case, options=options, layout=layout)
    known = Expected.by_reference(OPS[op], setting, dtype, seed, device)
    with guarded_memory():
        actual = known.results(functools.partial(known.problem.call, backend=backend))
    outcome = Outcome(None)
    compare_results(known, actual, outcome, compare.TIMES)
    assert outcome.failures == []


@contextlib.contextmanager
def guarded_memory() -> Iterator[None]:
    """A context in which uninitialised tensors are NaN, with margins of NaN around them that are checked at the end.

    An element that a kernel fails to write is NaN in the result; a write outside of the tensor changes a margin.
    """
    margin = 64  # elements: keeps any alignment that kernels may rely on
    guarded: list[tuple[Tensor, Tensor]] = []

    def allocate(shape, dtype, device) -> Tensor:
        size = torch.Size(shape).numel()
        fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        whole = torch.full((size + 2 * margin,), fill, dtype=dtype, device=device)
        guarded.append((whole[:margin], whole[margin + size :]))
        return whole[margin : margin + size].view(shape)

    def new_empty(self, *shape, dtype=None, device=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return allocate(shape, dtype or self.dtype, device or self.device)

    def empty_like(like, *, dtype=None, **_):
        return allocate(like.shape, dtype or like.dtype, like.device)

    def empty(*shape, dtype=None, device=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return allocate(shape, dtype or torch.get_default_dtype(), device or "cpu")

    with torch.device("cpu"):
        torch.empty(
            0
        )  # torch remembers by identity which functions such a context is for, when it first needs to know
    originals = torch.Tensor.new_empty, torch.empty_like, torch.empty
    torch.Tensor.new_empty, torch.empty_like, torch.empty = new_empty, empty_like, empty
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty_like, torch.empty = originals
    for margins in guarded:
        for part in margins:
            intact = part.isnan() if part.dtype.is_floating_point else part == torch.iinfo(part.dtype).max
            assert intact.all(), "a kernel wrote outside its output"


class KernelCall(NamedTuple):
    """The tensors and options of a call of ms_deform_attn's kernels, whose levels may lie anywhere."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    locations: Tensor  # in the fused form, offsets
    weights: Tensor  # in the fused form, logits
    points_per_level: tuple[int, ...]
    method: str = "bilinear"
    reference_points: Tensor | None = None  # the fused form

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        points = () if self.reference_points is None else (self.reference_points,)
        return tuple(tensor.contiguous() for tensor in (*self[:3], *points, *self[3:5]))

    def plan(self, backend: str) -> Plan:
        batch, _, heads, channels = self.value.shape
        output = (batch, self.weights.shape[1], heads * channels), self.value.dtype
        record = Plain if self.reference_points is None else Fused
        inputs = record(*self.tensors, self.points_per_level, self.method)
        return ms_deform_attn.kernels(backend, inputs, [output], checks_levels=False)


def launch_forward(backend: str, *call) -> Tensor:
    call = KernelCall(*call)
    return call.plan(backend).forward(*call.tensors)


def launch_backward(
    backend: str, grad_output: Tensor, needed: tuple[bool, ...], *call, deterministic: bool = False
) -> list[Tensor | None]:
    """Gradients of value, locations and weights, and, in the fused form, of the sampling locations."""
    call, count = KernelCall(*call), len(needed)
    if call.reference_points is not None:
        needed = (needed[0], count == 4 and needed[3], *needed[1:3])
    with reproducible(deterministic):
        found = call.plan(backend).backward(needed, grad_output, *call.tensors)
    value, *places, locations, weights = found
    likes = zip((value, locations, weights), (call.value, call.locations, call.weights))
    return [*(None if each is None else each.to(like.dtype) for each, like in likes), *places][:count]
