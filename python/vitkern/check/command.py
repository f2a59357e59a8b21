# SPDX-License-Identifier: Apache-2.0
"""The arguments of `vitkern check`. The checks, and torch with them, are imported when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitkern.commands.arguments import add_filters, add_repeated, names_exist, positive, refuse
from vitkern.commands.outputs import prove_file


def add_to(commands: Any) -> None:
    """Adds `vitkern check` to the commands of vitkern."""
    parser = commands.add_parser(
        "check", help="check outputs and gradients of all kernels, or of your own, on this machine"
    )
    add_filters(
        parser,
        case="only these inputs, such as 'injector-*'",
        backend="reference, cpu, cuda or triton, or one route of a backend, such as cpu-avx2",
        device="default: all devices",
        quick="fewer cases and dtypes, which take minutes on a CPU",
    )
    add_repeated(
        parser,
        "kinds",
        "oracle (against float64), gradcheck, repeat (bitwise equal calls) or subset (each gradient alone)",
    )
    parser.add_argument("--seed", type=int, help="seed of the random inputs (default 0)")
    parser.add_argument("--times", type=float, help="allowed multiple of plain torch's own error (default 2)")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit's XML for CI")
    parser.add_argument(
        "--list", action="store_true", help="list the checks that would run, and why others would not"
    )
    parser.add_argument(
        "--module", metavar="NAME", help="check your own MSDeformAttn, package.module:Name or file.py:Name"
    )
    parser.add_argument("--sanitize", action="store_true", help="run under compute-sanitizer, on a GPU")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    positive("--times", arguments.times)
    names_exist(arguments)
    prove_file(arguments.junit)
    from vitkern.check.plan import Request
    from vitkern.commands.choices import requested

    request = requested(Request, arguments)
    if arguments.module is not None:
        refuse(arguments, ("ops", "backends", "kinds", "list"), "does not go with --module")
    if arguments.sanitize:
        refuse(arguments, ("junit", "list"), "does not go with --sanitize")
        from vitkern.check.sanitize import sanitize

        return sanitize(request)
    if arguments.module is not None:
        from vitkern.check.user_module import check_module

        return check_module(request, junit=arguments.junit)
    from vitkern.check.run import run

    return run(request, junit=arguments.junit, only_list=arguments.list)
