# SPDX-License-Identifier: Apache-2.0
"""The results of the census as a page, and the changes since the last census."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_HEAD = """<!-- written by tools/census -->
# Layers of other projects

`tools/census` gets the sources of these releases and commits, builds each class with its own constructor and gives
it to `vitkern.patch`. {replaced} of {count} classes run on the kernel: {fused} on the fused one, {core} where they call
the function that samples. {left} stay as they are.

"fused": the kernel replaces softmax, locations and sampling. "core": the layer keeps its code, and only the function
that samples is the kernel. Differences are the largest of all outputs, and of all gradients, as a share of the largest
number, in float32. Milliseconds are the layer's own and the patched layer's, one thread, the least of three runs
beside other work, for a batch of one, 300 queries (BEVFormer's temporal layers: every pixel) and levels of 40 x 40
pixels and smaller. A layer whose compiled module is not there runs on the published op in plain torch, and its own
time is of that. Nothing here ran on a GPU.

| project | source | class | by | outputs | gradients | forward, ms | with backward, ms |
|---|---|---|---|---|---|---|---|
"""


def key(row: Row) -> tuple[str, str, str]:
    """Identifies the class of a row, whatever its release."""
    return row["project"], row["module"], row["kind"]


def page(rows: Sequence[Row]) -> str:
    counts = {by: sum(row["by"] == by for row in rows) for by in ("fused", "core", "left")}
    replaced = counts["fused"] + counts["core"]
    lines = [_line(row) for row in rows]
    stay = [
        f"- {row['project']}, `{row['module']}.{row['kind']}`: {_why(row)}"
        for row in rows
        if row["by"] == "left"
    ]
    unseen = [
        f"- {row['project']}, `{row['module']}.{row['kind']}`: {row['unless']}"
        for row in rows
        if row["by"] != "left" and row["unless"]
    ]
    parts = [_HEAD.format(replaced=replaced, count=len(rows), **counts) + "\n".join(lines)]
    parts += ["\n## Classes that stay\n\n" + "\n".join(stay)] if stay else []
    parts += ["\n## Classes that were tried, but not called here\n\n" + "\n".join(unseen)] if unseen else []
    return "\n".join(parts) + "\n"


def _why(row: Row) -> str:
    return str(row["unless"] or row["reason"])


def _line(row: Row) -> str:
    source = row["source"] if "@" not in row["source"] else row["source"][: row["source"].index("@") + 8]
    cells = [row["project"], source, f"`{row['module'].rpartition('.')[2]}.{row['kind']}`", row["by"]]
    if "outputs" in row:
        cells += [f"{row['outputs']:.1e}", f"{row['gradients']:.1e}"]
        cells += ["{} to {}".format(*row[name]) for name in ("forward", "backward")]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def changes(before: Mapping[tuple[str, str, str], Row], rows: Sequence[Row]) -> Iterator[str]:
    """The differences from the committed census: changed code, changed verdicts, and stand-ins with another verdict."""
    for row in rows:
        name = ".".join(key(row)[1:])
        then = before.get(key(row))
        if then is not None and then["hash"] != row["hash"]:
            yield f"changed: the code of {name} of {row['source']}, since {then['source']}"
        if then is not None and then["by"] != row["by"]:
            yield f"changed: {name} was {then['by']}, is {row['by']}: {row['reason']}"
        if row["stand_in"] and row["by"] != "left" and row["stand_in_by"] == "left":
            yield f"differs: {name} is {row['by']}, its stand-in {row['stand_in']} stays"
