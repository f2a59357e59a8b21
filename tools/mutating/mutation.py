# SPDX-License-Identifier: Apache-2.0
"""One change of a file's text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

RULES = ("sign", "index", "bound", "dtype", "barrier", "mask", "dropped term")


@dataclass(frozen=True)
class Mutation:
    file: str  # relative to the checkout
    rule: str
    start: int  # in the file's text
    before: str
    after: str
    line: int
    function: str = (
        ""  # the qualified name of the function around it; empty: code that runs at import, and C++
    )

    def applied(self, text: str) -> str:
        end = self.start + len(self.before)
        assert text[self.start : end] == self.before, f"{self.file} has changed"
        return text[: self.start] + self.after + text[end:]

    def key(self, text: str) -> str:
        """Identifies the mutation by the text of its line, so that it survives a move of the line."""
        lines = text.splitlines()
        column = self.start - text.rfind("\n", 0, self.start) - 1
        indent = len(lines[self.line - 1]) - len(lines[self.line - 1].lstrip())
        parts = (
            self.file,
            self.rule,
            lines[self.line - 1].strip(),
            str(column - indent),
            self.before,
            self.after,
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
