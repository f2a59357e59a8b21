# SPDX-License-Identifier: Apache-2.0
"""The command ``tools/fuzz``."""

from __future__ import annotations

import argparse
import math
import os
import sys

from tools.fuzzing.draw import BACKENDS, DTYPES, OPS
from tools.fuzzing.workers import Numbers, Tally, Wanted, fuzz


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.case is not None:
        return one(options.case)
    wanted = Wanted(options.op, backends_of(options.backend))
    end = None if options.cases is None else options.seed + options.cases
    numbers, minutes = Numbers(options.seed, end=end), options.minutes
    if minutes is None:
        minutes = 1.0 if end is None else math.inf
    tally = fuzz(minutes, numbers, options.workers, wanted, lambda text: print(text, flush=True))
    print(table(tally))
    return 1 if any(tally.wrong.values()) or not any(tally.counts.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz",
        description="Random calls of the ops, each number of the results against a bound of its own. "
        "Says which cases are wrong; each is made again by its number.",
    )
    parser.add_argument("--minutes", type=float, help="how long (default: 1, or as long as --cases take)")
    parser.add_argument("--cases", type=int, help="try so many numbers and no more")
    parser.add_argument("--case", type=int, help="run the case of this number alone, and tell all about it")
    parser.add_argument("--op", choices=OPS, help="cases of this op only")
    parser.add_argument("--backend", choices=tuple(BACKENDS), help="cases of this backend only")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (default: 0)")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        type=int,
        default=cores,
        help=f"processes (default: one for each core, {cores}); 0: no other",
    )
    return parser


def backends_of(name: str | None) -> tuple[str, ...]:
    """The backends that can run here; prints why others cannot."""
    from tools.fuzzing.call import left_out, routes

    asked = tuple(BACKENDS) if name is None else (name,)
    usable = tuple(backend for backend in asked if routes()[backend])
    for backend in asked:
        if backend not in usable:
            print(left_out(backend))
    return usable


def one(number: int) -> int:
    from tools.fuzzing.one import describe, try_case

    outcome = try_case(number)
    print(outcome.report())
    print("  " + describe(outcome.case))
    print("wrong" if outcome.found else "right")
    return 1 if outcome.found else 0


def table(tally: Tally) -> str:
    """A table of the cases of each op and backend by dtype, and the number of wrong ones."""
    lines = [
        f"{'op':22}{'backend':11}" + "".join(f"{dtype:>10}" for dtype in DTYPES) + f"{'all':>9}{'wrong':>7}"
    ]
    for op in OPS:
        for backend in BACKENDS:
            counts = [tally.counts[op, backend, dtype] for dtype in DTYPES]
            wrong = sum(tally.wrong[op, backend, dtype] for dtype in DTYPES)
            cells = "".join(f"{count:>10}" for count in counts)
            lines.append(f"{op:22}{backend:11}{cells}{sum(counts):>9}{wrong:>7}")
    count, wrong = sum(tally.counts.values()), sum(tally.wrong.values())
    lines.append(
        f"{count} cases in {tally.seconds:.0f} s, {count / tally.seconds:.1f} a second, {wrong} wrong; "
        f"{tally.unsure:.1%} of their numbers may be anything"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
