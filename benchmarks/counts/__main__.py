# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.counts: counts the memory accesses of every CUDA kernel, and the trips of its loops, without a
card.

It counts the ops whose sources have changed, writes benchmarks/counts/counts.json, and draws docs/counts.md from it.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.counts import cases, chain, machine_code, modelled, page, record
from benchmarks.counts.workers import count, everything


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__.split("\n\n")[0])
    parser.add_argument("--fresh", action="store_true", help="count everything, changed or not")
    parser.add_argument("--op", nargs="+", default=[], choices=record.OPS, help="count these, changed or not")
    parser.add_argument(
        "--draw", action="store_true", help="only draw the page from the counts that there are"
    )
    parser.add_argument("--check", action="store_true", help="count the small shapes, fail where they differ")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    return parser.parse_args(arguments)


def differences(found: dict[str, record.Row]) -> list[str]:
    """Descriptions of the launches whose counts differ from the committed ones."""
    before, told = record.committed()["counts"], []
    for name, row in found.items():
        if row != before.get(name):
            old = before.get(name, {"launches": []})["launches"]
            pairs = zip(row["launches"], old)
            kernels = [new["kernel"] for new, one in pairs if new != one]
            told.append(f"{name}: {', '.join(kernels) or 'launches, memory'} differ from counts.json")
    return told


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    known = record.committed()
    if options.check:
        small = {case.name: record.of_case(case, case.run()) for case in cases.small()}
        problems = differences(small) + page.problems(known)
        print("\n".join(problems) or "no difference")
        return 1 if problems else 0
    if not options.draw:
        digests = {op: record.digest(op) for op in record.OPS}
        stale = [
            op
            for op in record.OPS
            if options.fresh or op in options.op or known.get("sources", {}).get(op) != digests[op]
        ]
        found = known.get("counts", {}) | count(stale, options.workers)
        known |= {"sources": digests, "counts": {case.name: found[case.name] for case in everything()}}
        if "ms_deform_attn" in stale:
            known["modelled"] = modelled.measure(options.workers)
            known["chains"] = chain.measure()
            known["machine code"] = machine_code.measure() or known.get("machine code", {})
        record.write(known)
    page.write(known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
