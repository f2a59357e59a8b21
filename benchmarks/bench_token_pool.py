# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_token_pool: token_pool and token_project on the CPU against plain torch and attention.

"eager" is the formula in plain torch, "compiled" the same through torch.compile, "sdpa" torch's fused attention with
shared keys and values. A row is timed only if outputs and gradients agreed in this run. Times are minima over
interleaved rounds; ratios mean more than milliseconds. MB: the most memory that a call adds to the process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vitkern
from benchmarks.dense import Row, print_table
from vitkern import reference
from vitkern.cases import TOKEN_CASES

KEYS = 64  # numbers of a query of token_project
CASES = (("vt-3136", 8), ("vt-3136", 1), ("vt-resnet50", 32), ("vt-64", 8))  # and the batch


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


def make(op: str, name: str, batch: int, dtype: torch.dtype, backward: bool) -> Row:
    case = replace(TOKEN_CASES[name], batch=batch)
    inputs = case.make_pool() if op == "token_pool" else case.make_project(keys=KEYS)
    return Row(FUNCTIONS[op], inputs, dtype, (backward,) * len(inputs))


def main() -> None:
    rows = (
        (
            f"{op:<14}{name:<13}{batch:<6}{str(dtype)[6:]:<10}{what:<9}",
            partial(make, op, name, batch, dtype, what == "both"),
        )
        for op in FUNCTIONS
        for name, batch in CASES
        for dtype in (torch.float32, torch.bfloat16)
        for what in ("forward", "both")
    )
    heading = f"{'op':<14}{'case':<13}{'batch':<6}{'dtype':<10}{'pass':<9}"
    print_table(__doc__.splitlines()[0], heading, ("eager", "compiled", "sdpa"), rows)


if __name__ == "__main__":
    main()
