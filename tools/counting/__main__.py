# SPDX-License-Identifier: Apache-2.0
"""tools/census: tries every class, writes the results as data and as a page, and says what has changed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.counting import sources, table
from tools.counting.records import MMCV, RECORDS

ROOT = Path(__file__).parents[2]
DATA, PAGE = Path(__file__).parent / "census.json", ROOT / "docs" / "migration" / "layers.md"
Row = dict[str, Any]


def tried(number: int, below: Path) -> Row | str:
    """The row of one record, from a process of its own, or the error that ended it."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.counting.one", str(number), str(below)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        record = RECORDS[number]
        return f"{record.source} {record.module}.{record.kind}:\n{done.stderr[-1500:]}"
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(f"{row['by']:6} {row['project']}: {row['module']}.{row['kind']} {row['reason']}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/census", description=__doc__)
    parser.add_argument(
        "--sources", type=Path, default=ROOT / "build" / "census", help="folder for the sources"
    )
    parser.add_argument("--only", default="", help="projects whose name contains this; writes nothing")
    parser.add_argument("--page", action="store_true", help="writes the page from the committed data")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(table.page(json.loads(DATA.read_text())), encoding="utf-8")
        return
    below = arguments.sources.resolve()
    numbers = [n for n, each in enumerate(RECORDS) if arguments.only.lower() in each.project.lower()]
    for source in sorted({MMCV, *(RECORDS[number].source for number in numbers)}):
        sources.folder_of(source, below)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        found = list(pool.map(lambda number: tried(number, below), numbers))
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
