# SPDX-License-Identifier: Apache-2.0
"""The counted calls: each op, forward and backward, in shapes that users run, with several distributions of points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

import vitkern
from benchmarks.counts import baseline, counter
from benchmarks.counts.counter import Counted
from vitkern.cases import (
    ADAPTER_CASES,
    ATTENTION_CASES,
    TOKEN_CASES,
    AdapterBottleneckCase,
    MsDeformAttnCase,
    MsDeformAttnInputs,
    TokenCase,
    fused_inputs,
    make_inputs,
    pixel_centres,
)
from vitkern.cases.ops import OPS
from vitkern.check.examine import deterministic as deterministic_mode
from vitkern.ops import ms_deform_attn as attention_op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLACES = ("initial", "sigma 2 px", "uniform", "one pixel")
EVERY = 16  # of the blocks of a full shape, one is counted


@dataclass(frozen=True)
class Call:
    """A call of an op that computes the gradients of all inputs that require one."""

    function: Callable[..., Tensor]
    inputs: Mapping[str, Tensor]
    tables: Mapping[str, Tensor]  # that the function knows
    grad_output: Tensor
    deterministic: bool = False

    def __call__(self) -> None:
        wanted = [tensor for tensor in self.inputs.values() if tensor.requires_grad]
        with deterministic_mode(self.deterministic):
            torch.autograd.grad(self.function(*self.inputs.values()), wanted, self.grad_output)


@dataclass(frozen=True)
class Case:
    op: str
    form: str  # plain, fused, deterministic, baseline; "" where an op has one
    shape: str
    dtype: str
    places: str  # of points; "" where there are none
    run: Callable[..., Counted]  # takes the variables of counter.counting
    make: Callable[[str], Call] | None = None  # the call on a device; none of the baseline's
    small: bool = False

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.op, self.form, self.shape, self.dtype, self.places) if part)


# ---- Deformable attention


def _centres(case: MsDeformAttnCase, generator: torch.Generator) -> Tensor:
    if isinstance(case.queries, int):
        return torch.rand(case.queries, 2, generator=generator, dtype=torch.float64)
    return pixel_centres(case.queries)


def attention_inputs(case: MsDeformAttnCase, places: str) -> MsDeformAttnInputs:
    """Inputs in float32, with locations by `places`.

    "initial": the query's own point of the grid plus Deformable-DETR's initial offsets and noise of 0.2 pixels;
    "sigma 2 px": normal around that point, in pixels of each level; "uniform": anywhere; "one pixel": all in one cell.
    """
    if places == "uniform":
        return make_inputs(case, locations="uniform")
    inputs, generator = make_inputs(case), torch.Generator().manual_seed(1)
    shape = inputs.sampling_locations.shape
    sizes = inputs.spatial_shapes.flip(-1).double()[:, None]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) / sizes
    if places == "initial":
        where = inputs.sampling_locations + 0.2 * noise
    elif places == "sigma 2 px":
        where = _centres(case, generator)[None, :, None, None, None] + 2 * noise
    else:
        where = (((sizes / 2).floor() + 0.75) / sizes).expand(shape)
    return replace(inputs, sampling_locations=where.float().contiguous())


def _call(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    size: Sequence[int],
    without: str = "",
    deterministic: bool = False,
) -> Call:
    """`size`: the shape of the output; `without`: an input that needs no gradient."""
    leaves = {name: tensor.detach().requires_grad_(name != without) for name, tensor in inputs.items()}
    like = next(iter(inputs.values()))
    grad_output = torch.randn(*size, generator=torch.Generator().manual_seed(2)).to(like.device, like.dtype)
    return Call(function, leaves, tables, grad_output, deterministic)


def counted(make: Callable[[str], Call], **variables: object) -> Counted:
    call = make("cpu")
    names = {**call.inputs, **call.tables, "grad_output": call.grad_output}
    if call.deterministic:
        variables["REST"] = "ms_deform_attn_cells"
    with (
        counter.kernels_that_count(),
        counter.counting(counter.path(), names, **variables) as found,
        mock.patch.object(attention_op, "sort_by_cell", _named_sort(found)),
    ):
        call()
    return found


def _named_sort(counted: Counted) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The sort of the deterministic backward pass, which also reports its new tensors to the counter."""
    sort = attention_op.sort_by_cell

    def named(cells: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        order, first = sort(cells, bound)
        counted.name("order", order)
        counted.name("first", first)
        return order, first

    return named


def attention(case: MsDeformAttnCase, dtype: str, places: str, form: str, device: str = "cpu") -> Call:
    inputs = attention_inputs(case, places)
    tables = {"shapes": inputs.spatial_shapes.to(device), "starts": inputs.level_start_index.to(device)}
    function: Callable[..., Tensor] = vitkern.ms_deform_attn
    given = dict(zip(("value", "locations", "weights"), inputs.differentiable()))
    wide = ""
    if form == "fused":
        function, wide = vitkern.ms_deform_attn_fused, "reference"
        middle = inputs.sampling_locations.double().mean((2, 4))
        tensors = fused_inputs(inputs, middle, torch.Generator().manual_seed(0))
        given = dict(zip(("value", "reference", "offsets", "logits"), tensors))
    given = {
        name: tensor.to(device, torch.float32 if name == wide else DTYPES[dtype])
        for name, tensor in given.items()
    }

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return function(value, *tables.values(), *rest, backend="cuda")

    size = (case.batch, case.query_count, case.heads * case.channels)
    return _call(call, given, tables, size, wide, form == "deterministic")


def forward(case: MsDeformAttnCase, dtype: str, places: str, **variables: object) -> Counted:
    """The counts of the plain form's forward pass."""
    inputs = attention_inputs(case, places).to(DTYPES[dtype])
    names = dict(zip(("value", "shapes", "starts", "locations", "weights"), inputs))
    with counter.kernels_that_count(), counter.counting(counter.path(), names, **variables) as found:
        vitkern.ms_deform_attn(*inputs, backend="cuda")
    return found


def attention_of_baseline(case: MsDeformAttnCase, places: str, **variables: object) -> Counted:
    size = (case.batch, case.query_count, case.heads * case.channels)
    grad_output = torch.randn(*size, generator=torch.Generator().manual_seed(2))
    return baseline.run(attention_inputs(case, places), grad_output, **variables)[0]


# ---- The ops that multiply matrices


def dense(op: str, case: AdapterBottleneckCase | TokenCase, dtype: str, device: str = "cpu") -> Call:
    problem = OPS[op].make(case, device, 0).to(DTYPES[dtype])
    x = problem.inputs["x"]
    if "scale" in problem.inputs:
        problem.inputs["scale"] = problem.inputs["scale"].float()
    size = (len(x), problem.inputs["weight"].shape[-2], x.shape[-1]) if op == "token_pool" else x.shape
    return _call(functools.partial(problem.call, backend="cuda"), problem.inputs, {}, size)


# ---- All of them

ATTENTION = ("detr-encoder", "detr-decoder", "injector-B512", "extractor-B512")
_TOKENS = (TOKEN_CASES["vt-3136"].with_batch(1), TOKEN_CASES["vt-64"].with_batch(1))
DENSE: dict[str, tuple[AdapterBottleneckCase | TokenCase, ...]] = {
    "adapter_bottleneck": (ADAPTER_CASES["adaptformer-video"], ADAPTER_CASES["one-image"]),
    "token_pool": _TOKENS,
    "token_project": _TOKENS,
}


def _case(make: Callable[..., Call], *names: str, small: bool) -> Case:
    return Case(*names, functools.partial(counted, make), make, small)


def _attention_cases(shape: MsDeformAttnCase, places: str, small: bool) -> Iterator[Case]:
    op = "ms_deform_attn"
    for form, dtype in (("plain", "fp32"), ("plain", "bf16"), ("fused", "fp32"), ("deterministic", "fp32")):
        make = functools.partial(attention, shape, dtype, places, form)
        yield _case(make, op, form, shape.name, dtype, places, small=small)
    run = functools.partial(attention_of_baseline, shape, places)
    yield Case(op, "baseline", shape.name, "fp32", places, run, None, small)


def _dense_cases(op: str, shape: AdapterBottleneckCase | TokenCase, small: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        yield _case(functools.partial(dense, op, shape, dtype), op, "", shape.name, dtype, "", small=small)


def full() -> list[Case]:
    cases = [
        case
        for name in ATTENTION
        for places in PLACES
        for case in _attention_cases(ATTENTION_CASES[name].with_batch(1), places, False)
    ]
    return cases + [
        case for op, shapes in DENSE.items() for shape in shapes for case in _dense_cases(op, shape, False)
    ]


def small() -> list[Case]:
    """Every kernel at a size small enough for each run of the tests, also with a width that does not allow vectors."""
    shape = replace(ATTENTION_CASES["detr-encoder"].shrunk(), name="small")
    odd = replace(shape, name="small-odd", channels=37, queries=5)
    cases = [case for places in ("sigma 2 px", "one pixel") for case in _attention_cases(shape, places, True)]
    make = functools.partial(attention, odd, "fp32", "uniform", "plain")
    cases.append(_case(make, "ms_deform_attn", "plain", odd.name, "fp32", "uniform", small=True))
    for op, shapes in DENSE.items():
        cases += _dense_cases(op, replace(shapes[0].shrunk(), name="small"), True)
        if op != "adapter_bottleneck":  # more than 16 tokens
            cases += _dense_cases(op, replace(shapes[1].shrunk(), name="small-64"), True)
    return cases
