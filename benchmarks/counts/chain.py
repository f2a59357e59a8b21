# SPDX-License-Identifier: Apache-2.0
"""The longest chain of dependent loads: the tensors whose numbers decide where others are read, found by changing one
tensor and comparing the addresses that are read from the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from benchmarks.counts import baseline, cases
from benchmarks.counts.cases import Call
from benchmarks.counts.counter import Counted, Row
from vitkern.cases import ATTENTION_CASES, MsDeformAttnCase
from vitkern.ops import ms_deform_attn as attention_op

Addresses = dict[str, dict[str, list[int]]]  # by kernel and tensor
SHAPE = replace(ATTENTION_CASES["detr-encoder"].shrunk(), name="small")
FORMS = ("plain", "fused", "deterministic")


def changed(name: str, tensor: Tensor) -> Tensor:
    """A tensor with other, valid numbers."""
    if name == "shapes":  # levels begin where they did
        return tensor.flip(1)
    if name == "first":
        return tensor.clamp(max=int(tensor.max()) // 2)
    return tensor.flip(0 if tensor.dim() == 1 else 1)


def addresses(launches: list[Row]) -> Addresses:
    found: Addresses = {}
    for row in launches:
        for one in row["global"]:
            if one["what"] in ("load", "copy from"):
                found.setdefault(row["kernel"], {}).setdefault(one["tensor"], []).append(one["digest"])
    return found


def _with(make: Callable[[str], Call], name: str, device: str) -> Call:
    """The call, with other numbers in one tensor from the beginning."""
    call = make(device)
    with torch.no_grad():
        for tensors in (call.inputs, call.tables):
            if name in tensors:
                tensors[name].copy_(changed(name, tensors[name]).clone())
    return call


def _late(make: Callable[[str], Call], name: str) -> Counted:
    """The counts if one tensor changes when the points are sorted, just before the kernel that gathers gradients."""
    sort, call = attention_op.sort_by_cell, make("cpu")

    def then_changed(cells: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        known = dict(zip(("order", "first"), sort(cells, bound))) | dict(call.inputs)
        with torch.no_grad():
            if name in known:
                known[name].copy_(changed(name, known[name]).clone())
        return known["order"], known["first"]

    with mock.patch.object(attention_op, "sort_by_cell", then_changed):
        return cases.counted(lambda device: call)


def _of_baseline(case: MsDeformAttnCase, name: str) -> Counted:
    inputs = cases.attention_inputs(case, "sigma 2 px")
    fields = dict(zip(("value", "shapes", "starts", "locations", "weights"), inputs))
    if name in fields:
        fields[name].copy_(changed(name, fields[name]).clone())
    grad_output = torch.ones(case.batch, case.query_count, case.heads * case.channels)
    return baseline.run(inputs, grad_output)[0]


def longest(run: Callable[[str], Counted], tensors: tuple[str, ...]) -> dict[str, list[str]]:
    """For each kernel, the tensors of its longest chain in order; `run` takes the name of a tensor to change, or ""."""
    before = addresses(run("").launches)
    leads: dict[str, dict[str, set[str]]] = {kernel: {} for kernel in before}
    for name in tensors:
        for kernel, found in addresses(run(name).launches).items():
            leads[kernel][name] = {
                other
                for other, digests in found.items()
                if digests != before[kernel].get(other) and other != name
            }
    return {
        kernel: max((_from(t, leads[kernel]) for t in loaded), key=len) for kernel, loaded in before.items()
    }


def _from(tensor: str, leads: Mapping[str, set[str]]) -> list[str]:
    """The longest chain from this tensor; ties go by name, so that the result is always the same."""
    ways = (_from(other, leads) for other in sorted(leads.get(tensor, ())))
    return [tensor, *max(ways, key=len, default=[])]


def measure() -> dict[str, dict[str, list[str]]]:
    """The chains of attention's kernels, by form. No other op reads at addresses that depend on tensors."""
    found = {}
    for form in FORMS:
        make = functools.partial(cases.attention, SHAPE, "fp32", "sigma 2 px", form)
        if form == "deterministic":
            run = functools.partial(_late, make)
        else:
            run = lambda name, make=make: cases.counted(functools.partial(_with, make, name))  # noqa: E731
        chains = longest(run, (*make("cpu").inputs, "shapes", "order", "first"))
        gather = {kernel: chain for kernel, chain in chains.items() if "gather" in kernel}
        found[form] = gather if form == "deterministic" else chains
    tensors = ("value", "shapes", "locations", "weights")
    found["baseline"] = longest(functools.partial(_of_baseline, SHAPE), tensors)
    return found
