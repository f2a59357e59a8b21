# SPDX-License-Identifier: Apache-2.0
"""The arguments of `vitkern check`. What they start is imported when it starts: --help must not wait for torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """`vitkern check`, among the commands of vitkern."""
    parser = commands.add_parser(
        "check", help="are outputs and gradients right here? of all kernels, or of yours"
    )
    several = {"action": "append", "default": []}
    parser.add_argument("--op", **several, help="only this op; may be repeated, as the next ones")
    parser.add_argument("--case", **several, help="only these inputs, such as 'injector-*'")
    parser.add_argument(
        "--backend", **several, help="reference, cpu, cuda or triton, or one way to run it, such as cpu-avx2"
    )
    parser.add_argument("--dtype", **several, help="fp32, fp64, bf16 or fp16")
    parser.add_argument(
        "--kind", **several, help="oracle (against float64), gradcheck or repeat (the same bits again)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: all that there are")
    parser.add_argument("--quick", action="store_true", help="fewer cases and dtypes: minutes on a CPU")
    parser.add_argument(
        "--times", type=float, default=2.0, help="plain torch's own error that is allowed (default 2)"
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit's XML for CI")
    parser.add_argument("--list", action="store_true", help="say what would run, and what not and why")
    parser.add_argument(
        "--module", metavar="NAME", help="check package.module:Name or file.py:Name, an MSDeformAttn of yours"
    )
    parser.add_argument("--sanitize", action="store_true", help="run under compute-sanitizer, on a GPU")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from vitkern.check.errors import CheckError

    try:
        return _started(arguments)
    except CheckError as error:
        print(f"vitkern check: {error}", file=sys.stderr)
        return 2


def _started(arguments: argparse.Namespace) -> int:
    from vitkern.check.plan import Request

    request = Request(
        ops=arguments.op,
        cases=arguments.case,
        backends=arguments.backend,
        dtypes=arguments.dtype,
        kinds=arguments.kind,
        device=arguments.device,
        seed=arguments.seed,
        quick=arguments.quick,
    )
    if arguments.sanitize:
        from vitkern.check.sanitize import sanitize

        return sanitize(sys.argv[1:])
    if arguments.module is not None:
        from vitkern.check.theirs import check_module

        return check_module(arguments.module, request, times=arguments.times, junit=arguments.junit)
    from vitkern.check.run import run

    return run(request, junit=arguments.junit, times=arguments.times, only_list=arguments.list)
