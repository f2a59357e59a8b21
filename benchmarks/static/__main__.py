# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.static: figures of every GPU kernel, read from its machine code, without a GPU.

They are registers, spills, shared memory, occupancy, widths of accesses, reductions, and instructions of a point and
channel. docs/benchmarking.md explains the figures and holds the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from benchmarks.static import compilers, report, sass
from benchmarks.static.case import Case
from benchmarks.static.figures import MULTIPROCESSORS, Figures, measure
from benchmarks.static.kernels import all_cases

BACKENDS = ("cuda", "triton", "baseline")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch", nargs="+", type=int, default=list(MULTIPROCESSORS), choices=list(MULTIPROCESSORS)
    )
    parser.add_argument("--backend", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument(
        "--case", nargs="+", default=report.COMMITTED, help="dtypes and channels: fp32x32 bf16x64"
    )
    parser.add_argument(
        "--kernel", default="", help="only kernels whose line contains this, as 'backward fused'"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    parser.add_argument("--markdown", action="store_true", help="write the table of docs/benchmarking.md")
    parser.add_argument(
        "--check", action="store_true", help="fail where that table differs or a target is missed"
    )
    options = parser.parse_args(arguments)
    if (options.markdown or options.check) and options.case != report.COMMITTED:
        parser.error(f"the table in the docs holds the cases {' '.join(report.COMMITTED)}: leave --case out")
    return options


def why_not(backend: str) -> str | None:
    """The reason why the kernels of a backend cannot be compiled here, or None."""
    if sass.cuobjdump() is None:
        return "cuobjdump was not found: install triton, which carries it, or a CUDA toolkit"
    if backend == "triton":
        return compilers.why_no_triton()
    return None if compilers.nvcc() else "nvcc was not found: put the CUDA toolkit's bin folder on PATH"


def compiled(cases: list[Case], arch: int):
    """Pairs of case and kernel. One run of nvcc compiles all CUDA kernels of an architecture."""
    native = [case for case in cases if case.backend != "triton"]
    if native:
        yield from zip(native, compilers.compile_cuda([case.source for case in native], arch))
    for case in cases:
        if case.backend == "triton":
            yield case, compilers.compile_triton(case.source, arch)


def show(case: Case, arch: int, figures: Figures, as_json: bool) -> None:
    if as_json:
        row = {"arch": arch, "op": case.op, "backend": case.backend, "kernel": case.kernel, "form": case.form}
        print(json.dumps(row | {"case": f"{case.dtype}x{case.channels}"} | asdict(figures)), flush=True)
    else:
        print(f"sm_{arch:<4}{case.label:<58}{report.one_line(figures)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    absent = {backend: reason for backend in options.backend if (reason := why_not(backend))}
    for backend, reason in absent.items():
        print(f"{backend} kernels are left out: {reason}", file=sys.stderr)
    backends = [backend for backend in options.backend if backend not in absent]
    cases = [
        case for case in all_cases(options.case) if case.backend in backends and options.kernel in case.label
    ]
    if not cases:
        print("No kernel is left to be measured.", file=sys.stderr)
        return 1

    rows, problems = {}, []
    for arch in options.arch:
        for case, kernel in compiled(cases, arch):
            figures = measure(kernel, case, arch)
            show(case, arch, figures, options.json)
            rows[arch, case] = figures
            problems += report.missed(case, arch, figures)
    if options.markdown:
        report.write(rows)
    elif options.check:
        problems += report.differences(rows)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None):  # read when triton is imported, which is later
        print("TRITON_INTERPRET is ignored: nothing is interpreted here", file=sys.stderr)
    sys.exit(main())
