# SPDX-License-Identifier: Apache-2.0
"""The blocks of code in README.md and docs/, each with the remark in a comment before it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# <!-- not run: reason --> or <!-- slow --> may stand on the line before a fence.
_BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)

# Packages that vitkern does not need, but a block with the text on the left does.
_OPTIONAL = {
    "torch.onnx.export": ("onnx", "onnxscript"),
    "vitkern.onnx": ("onnx", "onnxscript"),
    "import onnxruntime": ("onnxruntime",),
    "import transformers": ("transformers",),
    'patch("transformers")': ("transformers",),
    "vitkern.compat.kernels": ("kernels",),
    "vitkern.compat.timm": ("timm",),
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code
    language: str
    text: str
    note: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def missing(self) -> list[str]:
        """The packages that the block needs and that are not installed."""
        code = re.sub(r"#.*", "", self.text)
        needed = {name for words, names in _OPTIONAL.items() if words in code for name in names}
        return sorted(name for name in needed if importlib.util.find_spec(name) is None)


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], m["text"], m["note"] or "")
        for m in _BLOCK.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]
