# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.prove_compare: tests `vitkern bench compare --live` on builds with a known difference.

The installed package is compared with a copy of itself, for which no row should show a difference, and with a copy
whose ops wait for a fifth of their time after each call, for which all forward passes should be slower. Fails if
fewer than 19 of 20 verdicts are right.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import vitkern
from vitkern import _C, triton_kernels
from vitkern.bench.live import compare_builds
from vitkern.bench.plan import Request
from vitkern.cases.ops import OPS

# 20 rows of each half.
CASES = ("injector-T512", "adaptformer-video", "vt-3136")
MORE = ("hub-small", "one-image", "vt-resnet18")

SLOWED = """
import functools as _functools, time as _time

def _slowed(function):
    @_functools.wraps(function)
    def run(*arguments, **options):
        started = _time.perf_counter()
        result = function(*arguments, **options)
        until = started + {factor} * (_time.perf_counter() - started)
        while _time.perf_counter() < until:
            pass
        return result
    return run

for _name in {names}:
    globals()[_name] = _slowed(globals()[_name])
"""


def copied(folder: Path, *, factor: float = 1.0) -> Path:
    """A copy of the installed package in a folder, with ops that are slower by a factor."""
    package = folder / "vitkern"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(vitkern.__file__).parent, package, ignore=ignored)
    shutil.copytree(
        Path(triton_kernels.__file__).parent, package / "triton_kernels", ignore=ignored, dirs_exist_ok=True
    )
    shutil.copy(_C.__file__, package)
    if factor != 1.0:
        with open(package / "functional.py", "a") as file:
            file.write(SLOWED.format(factor=factor, names=list(OPS)))
    return folder


def judged(name: str, wanted: str, run: Callable[[], list]) -> bool:
    print(f"\n{name}")
    verdicts = [row.verdict for row in run()]
    right = verdicts.count(wanted)
    print(f"{right} of {len(verdicts)} rows: {wanted}", flush=True)
    return right >= 0.95 * len(verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--part", choices=["same", "slowed"], help="only one half")
    given = parser.parse_args()
    options = {"launches": given.launches, "rounds": given.rounds, "smallest": 0.05}
    cases = {name for op in given.op or OPS for name in OPS[op].cases}
    right = []
    with tempfile.TemporaryDirectory() as scratch:
        a, b, slow = (Path(scratch) / name for name in ("a", "b", "slow"))
        copied(a), copied(b), copied(slow, factor=1.2)
        if given.part != "slowed":
            both = Request(given.op, [name for name in CASES if name in cases])
            right.append(
                judged(
                    "the same twice",
                    "no difference",
                    lambda: compare_builds(str(a), str(b), both, **options),
                )
            )
        if given.part != "same":
            forward = Request(
                given.op, [name for name in (*CASES, *MORE) if name in cases], passes=["forward"]
            )
            right.append(
                judged(
                    "slower by a fifth",
                    "slower",
                    lambda: compare_builds(str(a), str(slow), forward, **options),
                )
            )
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
