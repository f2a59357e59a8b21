# SPDX-License-Identifier: Apache-2.0
"""The results of ``vitkern.patch`` and ``install``: replaced layers with their kernels, and others with reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """Layers of one class, at places that differ only in numbers; or a module."""

    place: str  # "model.encoder.layers.*.self_attn"
    was: str  # a class or function
    now: str  # a function of this package
    paths: tuple[str, ...]  # every place

    @property
    def fused(self) -> bool:
        """Whether the kernel computes softmax and locations too."""
        return self.now.endswith("_fused")


class Left(NamedTuple):
    """A layer that looks replaceable and stays unchanged."""

    path: str
    was: str
    reason: str

    def __str__(self) -> str:
        return f"left as it is: {self.path} ({self.was}): {self.reason}"


class Table:
    """The replacements, row by row; ``left`` has the others, and why. A table without rows is false.

    ``taken``: compiled functions that a trial could not run here, and accepted by name as the published ones.
    """

    def __init__(
        self,
        replaced: Iterable[tuple[str, str, str]],
        left: Iterable[Left] = (),
        taken: Iterable[str] = (),
    ) -> None:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for path, was, now in replaced:
            groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), was, now), []).append(path)
        self.rows = tuple(Row(*group, tuple(paths)) for group, paths in groups.items())
        self.left = tuple(left)
        self.taken = tuple(sorted(set(taken)))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = ["nothing was replaced"]
        if self.rows:
            cells = [("where", "was", "is now", "places")]
            cells += [(row.place, row.was, row.now, str(len(row.paths))) for row in self.rows]
            widths = [max(map(len, column)) for column in zip(*cells)]
            lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        if self.taken:
            lines.append(f"verified by trial, taken by name as published: {', '.join(self.taken)}")
        return "\n".join([*lines, *map(str, self.left)])

    __repr__ = __str__
