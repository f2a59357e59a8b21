# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_token_pool: token_pool and token_project on the CPU against plain torch and attention.

"eager" is the formula in plain torch, "compiled" the same through torch.compile, "sdpa" torch's fused attention with
shared keys and values. A row is timed only if outputs and gradients agreed in this run. Times are minima over
interleaved rounds; look at ratios, not at milliseconds. MB: by how much a call raises the process's memory at most.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vitkern
from benchmarks.cases import TOKEN_CASES, TokenCase
from benchmarks.harness import agree, forward_backward, interleaved, peak_megabytes
from vitkern import _C, reference
from vitkern.doctor import cpu_model

KEYS = 64  # numbers of a query of token_project

# (op, case, batch, dtype, pass): one row each.
ROWS = [
    (op, name, batch, dtype, what)
    for op in ("token_pool", "token_project")
    for name, batch in (("vt-3136", 8), ("vt-3136", 1), ("vt-resnet50", 32), ("vt-64", 8))
    for dtype in (torch.float32, torch.bfloat16)
    for what in ("forward", "both")
]


def pool_by_attention(x: Tensor, weight: Tensor) -> Tensor:
    return scaled_dot_product_attention(weight.expand(x.shape[0], -1, -1), x, x, scale=1.0)


def project_by_attention(x: Tensor, query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    return x + scaled_dot_product_attention(query, key, tokens, scale=1.0)


FUNCTIONS = {
    "token_pool": {"eager": reference.token_pool, "sdpa": pool_by_attention, "vitkern": vitkern.token_pool},
    "token_project": {
        "eager": reference.token_project,
        "sdpa": project_by_attention,
        "vitkern": vitkern.token_project,
    },
}


def make(op: str, case: TokenCase) -> tuple[Tensor, ...]:
    return case.make_pool() if op == "token_pool" else case.make_project(keys=KEYS)


def measure(op: str, case: TokenCase, dtype: torch.dtype, what: str, compiles: bool, seconds: float):
    exact = make(op, case)
    if not agree(FUNCTIONS[op]["vitkern"], FUNCTIONS[op]["eager"], exact, dtype):
        return None
    inputs = tuple(tensor.to(dtype).requires_grad_(what == "both") for tensor in exact)
    functions: dict[str, Callable[..., Tensor]] = dict(FUNCTIONS[op])
    if compiles:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(functions["eager"], dynamic=False)

    def wrap(function):
        return forward_backward(function, inputs) if what == "both" else functools.partial(function, *inputs)

    with torch.set_grad_enabled(what == "both"):
        variants = {name: wrap(function) for name, function in functions.items()}
        samples = interleaved(variants, seconds=seconds)
        best = {name: min(times) for name, times in samples.items()}
        return best, {name: peak_megabytes(variants[name]) for name in ("vitkern", "eager")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="time limit of a row")
    parser.add_argument("--match", default="", help="only rows whose text contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiles = not arguments.no_compile and shutil.which("g++") is not None
    print(f"{cpu_model()}, {arguments.threads} threads, {_C.cpu_isa()} kernels, torch {torch.__version__}")
    columns = ("eager", "compiled", "sdpa")
    headings = "".join(f"{name + ' ms':>13}{'ratio':>7}" for name in columns)
    memory = f"{'vitkern MB':>12}{'eager MB':>10}"
    print(f"{'op':<14}{'case':<13}{'batch':<6}{'dtype':<10}{'pass':<9}{'vitkern ms':>10}{headings}{memory}")
    for op, name, batch, dtype, what in ROWS:
        label = f"{op:<14}{name:<13}{batch:<6}{str(dtype)[6:]:<10}{what:<9}"
        if arguments.match not in label:
            continue
        case = replace(TOKEN_CASES[name], batch=batch)
        measured = measure(op, case, dtype, what, compiles, arguments.seconds)
        if measured is None:
            print(f"{label}  results differ: not timed")
            continue
        best, peak = measured
        ours = best["vitkern"]
        cells = (
            f"{best[column]:>13.2f}{best[column] / ours:>6.1f}x" if column in best else f"{'-':>20}"
            for column in columns
        )
        print(
            f"{label}{ours:>10.2f}{''.join(cells)}{peak['vitkern']:>12.1f}{peak['eager']:>10.1f}", flush=True
        )


if __name__ == "__main__":
    main()
