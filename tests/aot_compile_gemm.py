# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels made of matrix products without a card and prints one line of JSON for each.

The launch functions run on meta tensors, with a recorder in place of each kernel, so exactly their launches are
compiled. Needs a process without TRITON_INTERPRET: ``python -m tests.aot_compile_gemm --arch 90 --dtype fp16``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.static.compilers import read_triton
from vitkern.ops import triton_adapter_bottleneck, triton_token_pool, triton_token_project
from vitkern.triton_kernels import (
    adapter_bottleneck,
    adapter_bottleneck_backward,
    tiles,
    token_pool,
    token_project,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
KERNELS = (
    (adapter_bottleneck, "adapter_bottleneck_forward"),
    (adapter_bottleneck_backward, "adapter_bottleneck_backward"),
    (tiles, "row_products"),
    (token_pool, "token_pool_forward"),
    (token_pool, "token_pool_merge"),
    (token_pool, "token_pool_backward"),
    (token_project, "token_project_forward"),
    (token_project, "token_project_backward"),
)


class Recorder:
    """Stands in for a kernel and records the arguments of its launches."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **named) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        bound = dict(zip(self.kernel.arg_names, arguments), **named)
        assert set(bound) == set(self.kernel.arg_names), "a launch that names other arguments than the kernel"
        self.launches.append((self.kernel, bound, options))


@contextlib.contextmanager
def recorded() -> Iterator[list]:
    """A context in which launches are appended to the list instead of running on a card."""
    launches: list = []
    kernels: list[tuple[ModuleType, str, object]] = [(m, name, getattr(m, name)) for m, name in KERNELS]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def compile_launch(kernel, bound: dict, options: dict, arch: int):
    """Compiles one launch, specialised as by Triton's launcher."""
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, argument = parameter.name, bound[parameter.name]
        if parameter.is_constexpr or argument is None or (isinstance(argument, int) and argument == 1):
            signature[name], constants[name] = "constexpr", argument
        elif isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
            if argument % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options}
    )


def figures(compiled) -> dict[str, object]:
    ptx = compiled.asm["ptx"]
    mma = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx)
    copies = [
        f"cp.async.{int(size, 16)}"
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x(\w+)", ptx)
    ]
    kernel = read_triton(compiled)
    accesses = dict(sorted(kernel.opcodes(r"(LDG|STG|REDG?|ATOMG?)\.").items()))
    return {
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared": kernel.shared,
        "accesses": accesses | {name: copies.count(name) for name in sorted(set(copies))},
        "mma": {name: mma.count(name) for name in sorted(set(mma))},
    }


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pool(dtype: torch.dtype, channels: int, tokens: int, batch: int = 8, pixels: int = 3136) -> None:
    x, weight = empty(batch, pixels, channels, dtype=dtype), empty(batch, tokens, channels, dtype=dtype)
    plan = triton_token_pool.plan(triton_token_pool.Inputs(x, weight))
    pooled, statistics = plan.forward(x, weight)
    plan.backward((True, True), pooled, x, weight, pooled, statistics)


def project(dtype: torch.dtype, channels: int, tokens: int, batch: int = 8, pixels: int = 3136) -> None:
    """token_project with half as many channels in queries and keys as in x."""
    sizes = (batch, pixels, channels), (batch, pixels, channels // 2), (batch, tokens, channels // 2)
    x, *others = (empty(*size, dtype=dtype) for size in (*sizes, (batch, tokens, channels)))
    plan = triton_token_project.plan(triton_token_project.Inputs(x, *others))
    plan.forward(x, *others)
    plan.backward((True, True, True), x, None, *others)


def adapter(dtype: torch.dtype, channels: int, hidden: int, rows: int = 50176) -> None:
    """The training of AdaptFormer: all gradients needed, dropout, the residual is x."""
    inputs = triton_adapter_bottleneck.Inputs(
        x=empty(rows, channels, dtype=dtype),
        down_weight=empty(hidden, channels, dtype=dtype),
        down_bias=empty(hidden, dtype=dtype),
        up_weight=empty(channels, hidden, dtype=dtype),
        up_bias=empty(channels, dtype=dtype),
        residual=None,
        scale=empty(1, dtype=torch.float32),
        seed=empty(1, dtype=torch.int64),
        dropout_p=0.1,
        activation="gelu",
        residual_is_x=True,
    )
    plan, tensors = triton_adapter_bottleneck.plan(inputs), inputs[:8]
    output, kept = plan.forward(*tensors)
    plan.backward((True,) * 6, output, *tensors, kept)


def odd(dtype: torch.dtype) -> None:
    adapter(dtype, 33, 5, rows=1)
    pool(dtype, 300, 3, batch=1, pixels=1)
    project(dtype, 33, 70, batch=1, pixels=1)


SHAPES: dict[str, Callable[[torch.dtype], None]] = {
    "adapter-768-64": lambda dtype: adapter(dtype, 768, 64),
    "adapter-1024-64": lambda dtype: adapter(dtype, 1024, 64),
    "pool-256-16": lambda dtype: pool(dtype, 256, 16),
    "pool-1024-16": lambda dtype: pool(dtype, 1024, 16),
    "project-256-16": lambda dtype: project(dtype, 256, 16),
    "project-1024-16": lambda dtype: project(dtype, 1024, 16),
}
CASES = SHAPES | {
    "project-256-64": lambda dtype: project(dtype, 256, 64),
    "project-256-128": lambda dtype: project(dtype, 256, 128),
    "adapter-768-128": lambda dtype: adapter(dtype, 768, 128),
    "adapter-768-256": lambda dtype: adapter(dtype, 768, 256),
    "odd": odd,
    "adapter-768-512": lambda dtype: adapter(dtype, 768, 512),
    "pool-256-64": lambda dtype: pool(dtype, 256, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", default=list(SHAPES), choices=list(CASES))
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100, 120])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tf32", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    for case, dtype in itertools.product(options.case, options.dtype):
        with recorded() as launches:
            CASES[case](DTYPES[dtype])
        for arch, (kernel, bound, launch_options) in itertools.product(options.arch, launches):
            compiled = compile_launch(kernel, bound, launch_options, arch)
            row = {"kernel": kernel.__name__, "arch": arch, "case": case, "dtype": dtype}
            print(json.dumps(row | figures(compiled)), flush=True)


if __name__ == "__main__":
    main()
