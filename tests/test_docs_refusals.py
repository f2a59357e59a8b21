# SPDX-License-Identifier: Apache-2.0
"""docs/migration/proof.md explains every reason that a trial can give to refuse a layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT
from vitkern.compat import patching, trial

PAGE = (ROOT / "docs" / "migration" / "proof.md").read_text(encoding="utf-8")
# inputs.py refuses roles that no form has.
TRIAL = [file for file in sorted(Path(trial.__file__).parent.glob("*.py")) if file.stem != "inputs"]


def sentences(source: str) -> Iterator[str]:
    """The fixed parts, of three words or more, of the texts that a module returns, yields, or refuses a layer with."""
    for node in ast.walk(ast.parse(source)):
        refuses = isinstance(node, ast.Raise) and "Unfit" in ast.unparse(node)
        if refuses or isinstance(node, ast.Return | ast.Yield):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    text = part.value.strip(" ,:'")
                    if text.count(" ") >= 2:
                        yield text


@pytest.mark.parametrize("file", TRIAL, ids=lambda file: file.stem)
def test_every_refusal_is_explained(file):
    assert [text for text in sentences(file.read_text(encoding="utf-8")) if text not in PAGE] == []


def test_obstacles_are_explained():
    tree = ast.parse(Path(patching.__file__).read_text(encoding="utf-8"))
    (obstacle,) = (each for each in ast.walk(tree) if getattr(each, "name", "") == "_obstacle")
    found = list(sentences(ast.unparse(obstacle)))
    assert len(found) == 2 and all(text in PAGE for text in found)
