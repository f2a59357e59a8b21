# SPDX-License-Identifier: Apache-2.0
"""tools/census: tries every class, writes the results as data and as a page, and lists changes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import traceback
from pathlib import Path
from typing import Any

from tools.counting import one, sources, table
from tools.counting.records import MMCV, RECORDS

ROOT = Path(__file__).parents[2]
DATA, PAGE = Path(__file__).parent / "census.json", ROOT / "docs" / "migration" / "layers.md"
Row = dict[str, Any]


def tried(job: tuple[int, Path]) -> Row | str:
    """The row of one record, or the error that ended it. Each record has its own process."""
    number, below = job
    record = RECORDS[number]
    try:
        row = one.verdict(number, below)
    except Exception:
        return f"{record.source} {record.module}.{record.kind}:\n{traceback.format_exc()[-1500:]}"
    print(f"{row['by']:6} {row['project']}: {row['module']}.{row['kind']} {row['reason']}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/census", description=__doc__)
    parser.add_argument(
        "--sources", type=Path, default=ROOT / "build" / "census", help="folder for the sources"
    )
    parser.add_argument("--only", default="", help="projects whose name contains this; writes nothing")
    parser.add_argument("--workers", type=int, default=1, help="processes; more than one disturb the times")
    parser.add_argument("--page", action="store_true", help="writes the page from the committed data")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(table.page(json.loads(DATA.read_text())), encoding="utf-8")
        return
    below = arguments.sources.resolve()
    numbers = [n for n, each in enumerate(RECORDS) if arguments.only.lower() in each.project.lower()]
    for source in sorted({MMCV, *(RECORDS[number].source for number in numbers)}):
        sources.folder_of(source, below)
    context = multiprocessing.get_context("fork")  # of this process, where torch has run nothing yet
    with context.Pool(arguments.workers, maxtasksperchild=1) as pool:
        found = pool.map(tried, [(number, below) for number in numbers], chunksize=1)
    rows = [each for each in found if not isinstance(each, str)]
    before = {table.key(row): row for row in json.loads(DATA.read_text())} if DATA.is_file() else {}
    for line in table.changes(before, rows):
        print(line)
    if errors := [each for each in found if isinstance(each, str)]:
        sys.exit("\n".join(errors))
    if not arguments.only:
        DATA.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(table.page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
