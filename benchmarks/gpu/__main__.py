# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.gpu: tests, sanitizers, figures, block sizes, counters and rates of a card, in runs.

Each call continues where the last one stopped. It exits with 0 if all is done and right, 1 if something failed, 2 if
the request cannot be met, 3 if something is left for the next call.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.gpu import bench, contenders, correct, counts, model, table, tune
from benchmarks.gpu.common import (
    DONE,
    REFUSED,
    RESULTS,
    SECONDS,
    STATE,
    Budget,
    demand_a_card,
    environment,
    file_for,
    folder_of,
    how_long,
    version_of,
)
from vitkern.commands.arguments import refuse
from vitkern.commands.choices import chosen
from vitkern.commands.errors import CommandError

_OF_BENCH = ("op", "case", "dtype", "without")
# The options without effect, by part.
WITHOUT_EFFECT = {
    "correct": (*_OF_BENCH, "check"),
    "sanitize": (*_OF_BENCH, "check"),
    "bench": ("check",),
    "tune": ("without", "check"),
    "counts": (*_OF_BENCH, "check"),
    "model": (*_OF_BENCH, "check"),
    "table": (*_OF_BENCH, "dry", "fresh", "commit"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"nargs": "+", "default": [], "metavar": "NAME"}
    parser.add_argument(
        "part",
        choices=WITHOUT_EFFECT,
        help="table: that of docs/performance.md, from the files that there are",
    )
    parser.add_argument("--dry", action="store_true", help="list what would run; needs no card")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"limit of this call (default {SECONDS:.0f})"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls did at this commit")
    parser.add_argument("--commit", help="written into results where no repository tells it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--op", **several, help="bench, tune: only these ops")
    parser.add_argument("--case", **several, help="bench, tune: only these shapes, such as 'injector-*'")
    parser.add_argument("--dtype", **several, help="bench, tune: fp16, bf16, fp32")
    parser.add_argument(
        "--without", **several, help="bench: leave these contenders out, such as 'torch compiled'"
    )
    parser.add_argument("--check", action="store_true", help="table: fail where the page has another")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return started(options)
    except CommandError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return REFUSED


def started(options: argparse.Namespace) -> int:
    refuse(options, WITHOUT_EFFECT[options.part], f"has no effect on {options.part}: leave it out")
    if options.seconds <= 0:
        raise CommandError(f"--seconds has to be more than 0, got {options.seconds:g}")
    if options.part == "table":
        return table.main(options.results, check=options.check)
    return tried(options) if options.part in ("correct", "sanitize") else measured(options)


def tried(options: argparse.Namespace) -> int:
    steps = correct.correct() if options.part == "correct" else correct.sanitized()
    if options.dry:
        correct.listing(steps)
        return DONE
    demand_a_card()
    if options.part == "sanitize":
        correct.demand_the_sanitizer()
    folder = STATE / version_of(environment(options.commit)) / options.part
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    return correct.run(steps, folder, Budget(options.seconds))


def measured(options: argparse.Namespace) -> int:
    part = {"bench": bench, "tune": tune, "counts": counts, "model": model}[options.part]
    filters = () if part in (counts, model) else (options.op, options.case, options.dtype)
    wanted = part.subjects(*filters)
    without = [chosen("contender", options.without, contenders.known())] if part is bench else []
    if options.dry:
        part.listing(wanted, *without)
        print(f"\n{how_long(part.seconds_of_timing(wanted), options.seconds)}")
        return DONE
    demand_a_card()
    found = environment(options.commit)
    path = file_for(options.results / folder_of(found) / part.FOLDER, version_of(found), bench.today())
    if options.fresh:
        path.unlink(missing_ok=True)
    return part.run(wanted, path, found, Budget(options.seconds), *without)


if __name__ == "__main__":
    sys.exit(main())
