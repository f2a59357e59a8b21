# SPDX-License-Identifier: Apache-2.0
"""The arguments of `vitkern bench`. The code of each command, and torch with it, is imported when the command runs."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkern.commands.arguments import add_filters, add_repeated, names_exist, positive, refuse
from vitkern.commands.errors import INTERRUPTED, CommandError
from vitkern.commands.outputs import prove_file

if TYPE_CHECKING:
    from vitkern.bench.plan import Request

# Differences between two runs of the same build on a shared machine, and between two builds in turn.
SMALLEST = {False: 0.15, True: 0.05}
LAUNCHES, ROUNDS = 7, 4
FILTERS = ("ops", "cases", "backends", "dtypes", "passes", "device", "batch", "threads", "quick")


def add_to(commands: Any) -> None:
    """Adds `vitkern bench` and its own commands to the commands of vitkern."""
    bench = commands.add_parser("bench", help="measure how fast the kernels are, and how far from the limit")
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="command")

    run = kinds.add_parser("run", help="check and time ops, against plain torch and the machine's limit")
    _add_filters(run)
    run.add_argument(
        "--seconds", type=float, help="time for all backends of a row together (default 4, quick 1)"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write all results, with samples")
    run.set_defaults(run=_run)

    compare = kinds.add_parser(
        "compare", help="find slower rows between two files, or with --live two builds"
    )
    compare.add_argument(
        "a", metavar="A", help="a file of `run --json`; with --live a build, see the documentation"
    )
    compare.add_argument("b", metavar="B", help="the file or build to compare with A")
    compare.add_argument("--live", action="store_true", help="time two builds in turn")
    compare.add_argument(
        "--smallest", type=float, help="smallest difference that counts (default 0.15, with --live 0.05)"
    )
    compare.add_argument(
        "--fail-on", choices=["slower"], help="exit with 1 if a row is slower or fails its check"
    )
    compare.add_argument("--anyway", action="store_true", help="compare files of different machines")
    compare.add_argument(
        "--launches", type=int, help=f"with --live: number of process launches (default {LAUNCHES})"
    )
    compare.add_argument(
        "--rounds", type=int, help=f"with --live: rounds of a row per launch (default {ROUNDS})"
    )
    _add_filters(compare, "with --live: ")
    compare.set_defaults(run=_compare)

    report = kinds.add_parser("report", help="write a page with plots, and the same in Markdown")
    report.add_argument("file", type=Path, help="a file of `run --json`")
    report.add_argument(
        "-o", "--output", type=Path, help="report.html or report.md; by default both, named like the file"
    )
    report.set_defaults(run=_report)


def _add_filters(parser: argparse.ArgumentParser, when: str = "") -> None:
    add_filters(
        parser,
        when=when,
        case="only these shapes, such as 'injector-*'",
        backend="cpu, cuda, triton, reference or torch",
        device="default: cuda if there is one",
        quick="small shapes, which take minutes",
    )
    add_repeated(parser, "passes", f"{when}forward, backward or both (a training step)")
    parser.add_argument("--batch", type=int, help=f"{when}default: 1 on a CPU, the case's batch on a GPU")
    parser.add_argument("--threads", type=int, help=f"{when}default: torch's own number")


def _request(arguments: argparse.Namespace) -> Request:
    positive("--threads", arguments.threads)
    import torch

    from vitkern.bench.plan import Request
    from vitkern.commands.choices import requested

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return requested(Request, arguments)


def _run(arguments: argparse.Namespace) -> int:
    positive("--seconds", arguments.seconds)
    names_exist(arguments)
    prove_file(arguments.json)
    from vitkern.bench.run import run
    from vitkern.bench.store import File

    file = None if arguments.json is None else File(arguments.json)
    record = run(
        _request(arguments),
        file=file,
        seconds=arguments.seconds,
        command=["vitkern", *sys.argv[1:]],
    )
    failed = sum(not row["verified"] for row in record["rows"])
    told = f", written to {file.path}" if file else ""
    print(
        f"{record['status']}: {len(record['rows'])} rows in {record['seconds']:.0f} s, {failed} FAILED{told}"
    )
    return INTERRUPTED if record["status"] == "interrupted" else int(failed > 0)


def _compare(arguments: argparse.Namespace) -> int:
    smallest = SMALLEST[arguments.live] if arguments.smallest is None else arguments.smallest
    if not 0 <= smallest < math.inf:
        raise CommandError(f"--smallest must be at least 0, got {smallest:g}")
    names_exist(arguments)
    if arguments.live:
        refuse(arguments, ["anyway"], "is for files; builds run on this machine")
        from vitkern.bench.live import compare_builds

        rows = compare_builds(
            arguments.a,
            arguments.b,
            _request(arguments),
            launches=LAUNCHES if arguments.launches is None else arguments.launches,
            rounds=ROUNDS if arguments.rounds is None else arguments.rounds,
            smallest=smallest,
        )
    else:
        refuse(arguments, FILTERS, "is for --live; of two files all rows are compared")
        refuse(arguments, ("launches", "rounds"), "is for --live; files have been measured")
        from vitkern.bench.compare import compare_files

        rows = compare_files(Path(arguments.a), Path(arguments.b), smallest=smallest, anyway=arguments.anyway)
    return int(arguments.fail_on is not None and any(row.is_worse for row in rows))


def _report(arguments: argparse.Namespace) -> int:
    from vitkern.bench.report import write_reports

    for path in write_reports(arguments.file, arguments.output):
        print(path)
    return 0
