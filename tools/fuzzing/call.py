# SPDX-License-Identifier: Apache-2.0
"""Runs a case through the public functions and autograd, and the oracle on the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers import guarded_memory
from tests.runners import RUNNERS
from tools.fuzzing import adapter, attention, tokens
from tools.fuzzing.arithmetic import OF, TRUNCATED, Arithmetic, Array, Bounded, accumulator, exact
from tools.fuzzing.draw import BACKENDS, TORCH, Case
from tools.fuzzing.sampling import Level
from vitkern import functional
from vitkern.check.examine import deterministic
from vitkern.check.routes import Route, all_routes

_SEEDS = 2**63 - 1


def _known() -> list[Route]:
    """The routes of each backend on the CPU: every instruction set of cpu, one route of the others."""
    every = [*RUNNERS, *(route for route in all_routes("cpu") if route.backend == "reference")]
    return [route for route in every if route.device == "cpu" and route.name != "cpu-wide"]


def routes() -> dict[str, list[Route]]:
    """The routes that can run here, by backend."""
    usable = [route for route in _known() if route.reason is None]
    return {name: [route for route in usable if route.backend == name] for name in BACKENDS}


def left_out(backend: str) -> str:
    """The reason why none of the backend's routes can run here."""
    reasons = [f"{route.name}: {route.reason}" for route in _known() if route.backend == backend]
    return f"{backend} is left out ({'; '.join(reasons)})"


Output = Tensor | tuple[Tensor, Tensor]
Actual = dict[str, Tensor]


def function(case: Case) -> Callable[..., Output]:
    """The public function as a function of the case's tensors by name."""
    op: Callable[..., Output] = getattr(functional, case.op)
    options = {**case.options, "backend": case.backend}

    def call(**tensors: Tensor | None) -> Output:
        if case.op.startswith("ms_deform_attn"):
            value, *rest = tensors.values()
            return op(value, *case.tables, *rest, **options)
        if case.op == "adapter_bottleneck":
            torch.manual_seed(case.number)
            x, *parameters, residual, scale = tensors.values()
            factor = {} if scale is None else {"scale": scale}
            return op(x, *parameters, residual=x if case.residual_is_x else residual, **factor, **options)
        return op(*tensors.values(), **options)

    return call


_MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@contextlib.contextmanager
def _settings(case: Case) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with deterministic(case.deterministic), _MODES[case.mode]():
            yield
    finally:
        torch.set_num_threads(before)


def actual(case: Case, run: Callable[..., Output]) -> Actual:
    """The output and the needed gradients."""
    leaves = {
        name: tensor.detach().requires_grad_(name in case.wanted)
        for name, tensor in case.tensors.items()
        if tensor is not None
    }
    with _settings(case), guarded_memory() if case.guarded else contextlib.nullcontext():
        output = run(**{name: leaves.get(name) for name in case.tensors})
        results: Actual = {}
        if isinstance(output, tuple):
            output, results["attention"] = output
        results["output"] = output
        if output.requires_grad:
            wanted = [leaves[name] for name in case.wanted]
            gradients = torch.autograd.grad(output, wanted, case.grad_output, allow_unused=True)
            results |= {name: g for name, g in zip(case.wanted, gradients) if g is not None}
    return {name: result.detach() for name, result in results.items()}


def _numbers(tensor: Tensor, *dtypes: str) -> Array:
    """The numbers in float64, after conversion to these types, as in the op."""
    for dtype in dtypes:
        tensor = tensor.to(TORCH[dtype])
    return np.asarray(tensor.double().resolve_neg().resolve_conj().numpy())


def factors(case: Case) -> Arithmetic:
    """The arithmetic that rounds the factors of a second product: tensor cores take the type of x."""
    if truncates(case):
        return TRUNCATED
    return OF[case.dtype] if case.backend in ("cuda", "triton") else accumulator(case.dtype)


def truncates(case: Case) -> bool:
    return case.backend == "triton" and case.dtype == "bfloat16"


def expected(case: Case) -> dict[str, Bounded]:
    with np.errstate(all="ignore"):
        return _EXPECTED[case.op](case)


def _attention(case: Case) -> dict[str, Bounded]:
    acc, value = accumulator(case.dtype), _numbers(case.first)
    batch, _, heads, channels = value.shape
    fused = case.op == "ms_deform_attn_fused"
    where = case.tensor("offsets" if fused else "locations")
    flat = _numbers(case.tensor("logits" if fused else "weights"), acc.name)
    points = case.options.get("points_per_level")
    if points is None:
        points = [where.shape[4]] * where.shape[3]
    ends = np.cumsum([0, *points])
    levels = [
        Level(*size, start, slice(int(ends[i]), int(ends[i + 1])))
        for i, (size, start) in enumerate(zip(case.levels, case.starts))
    ]
    queries, count = flat.shape[1], int(ends[-1])
    places = _numbers(where, acc.name).reshape(batch, queries, heads, count, 2)
    weights = flat.reshape(batch, queries, heads, count)
    grad = _numbers(case.grad_output).reshape(batch, queries, heads, channels)
    call = acc, levels, case.options["method"], value
    if fused:
        reference = _numbers(case.tensor("reference_points"), acc.name)
        results = attention.expected_fused(*call, reference, places, weights, grad)
    else:
        results = attention.expected_plain(*call, places, weights, grad)
    if value.size == 0:  # no sum has a term: NaN times nothing is 0 or NaN
        results = {name: r.undecided(~np.isfinite(r.value)) for name, r in results.items()}
    return results


def _adapter(case: Case) -> dict[str, Bounded]:
    acc, t, dtype, x = accumulator(case.dtype), case.tensors, case.dtype, case.first
    rows = (int(np.prod(x.shape[:-1], dtype=np.int64)), x.shape[-1])
    inputs: dict[str, Array | None] = {
        name: None if tensor is None else _numbers(tensor, dtype)
        for name, tensor in t.items()
        if name.startswith(("down", "up"))
    }
    beside = t["residual"]
    apart = beside is not None and beside.dtype != x.dtype
    inputs["x"] = inputs["residual"] = _numbers(x).reshape(rows)
    if not case.residual_is_x:
        inputs["residual"] = None if beside is None or apart else _numbers(beside).reshape(rows)
    scale, seed, p = t["scale"], None, case.options.get("dropout_p", 0.0)
    inputs["scale"] = np.asarray(case.options.get("scale", 1.0))
    if scale is not None:
        inputs["scale"] = _numbers(scale, acc.name).reshape(())
    if case.options.get("training") and p > 0:
        torch.manual_seed(case.number)
        seed = int(torch.randint(_SEEDS, (1,), dtype=torch.int64))
    g = _numbers(case.grad_output, dtype).reshape(rows)
    results = adapter.expected(
        acc, factors(case), inputs, g, seed=seed, dropout_p=p,
        activation=case.options["activation"], scale_is_exact=scale is not None,
    )  # fmt: skip
    if case.residual_is_x:
        results["x"] = acc.add(results["x"], exact(g))
    if beside is not None:
        results["residual"] = exact(_numbers(case.grad_output, _name(beside)).reshape(rows))
    if beside is not None and apart:  # added by torch to what is rounded already
        sums, other = OF[_name(case.grad_output)], _numbers(beside).reshape(rows)
        stored = TRUNCATED if truncates(case) else OF[dtype]
        results["output"] = sums.add(stored.rounded(results["output"]), exact(other))
    return results


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pool(case: Case) -> dict[str, Bounded]:
    x, weight = _numbers(case.first), _numbers(case.tensor("weight"), case.dtype)
    acc, stored = accumulator(case.dtype), OF[case.dtype]
    return tokens.expected_pool(acc, factors(case), stored, x, weight, _numbers(case.grad_output))


def _project(case: Case) -> dict[str, Bounded]:
    x, query, key, values = (_numbers(case.tensor(name)) for name in case.tensors)
    grad = _numbers(case.grad_output)
    return tokens.expected_project(accumulator(case.dtype), factors(case), x, query, key, values, grad)


_EXPECTED = {
    "ms_deform_attn": _attention,
    "ms_deform_attn_fused": _attention,
    "adapter_bottleneck": _adapter,
    "token_pool": _pool,
    "token_project": _project,
}
