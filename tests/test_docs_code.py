# SPDX-License-Identifier: Apache-2.0
"""The code in README and docs runs: Python as it is, commands up to the parsing of their arguments."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
import shlex
import sys

import pytest
import torch
from torch import nn

import vitkern
from tests.documents import PAGES, ROOT, Block, blocks
from tests.layers_of_others import MSDeformAttn
from vitkern.cli import make_parser

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # exporters warn of each other
    pytest.mark.skipif(
        torch.__version__ < torch.torch_version.TorchVersion("2.6") or sys.platform != "linux",
        reason="the pages are written for torch 2.6 and later on Linux",
    ),
]

_SLOW = {page for page in PAGES for block in blocks(page, "python") if block.note == "slow"}
_LANGUAGES = {"python", "sh", "text", "yaml", "cpp", "cuda"}


def _pages(language: str) -> list:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] * (page in _SLOW))
        for page in PAGES
        if blocks(page, language)
    ]


@pytest.fixture
def names(monkeypatch, tmp_path):
    """The globals that a page's blocks share; `model` stands for the reader's. Patches of other projects are undone."""
    monkeypatch.chdir(tmp_path)
    yield {"__name__": "__main__", "model": nn.ModuleList([MSDeformAttn()])}
    vitkern.uninstall()
    if importlib.util.find_spec("transformers"):
        vitkern.unpatch("transformers")


@pytest.mark.parametrize("page", _pages("python"))
def test_python_runs_from_top_to_bottom(page, names, subtests):
    absent: dict[str, str] = {}  # names that blocks which were not run would have made
    for block in blocks(page, "python"):
        with subtests.test(block.where):
            reason = _why_not(block, absent)
            if reason:
                absent.update(dict.fromkeys(_stored(block) - names.keys(), f"{block.where} was not run"))
                pytest.skip(reason)
            _run(block, names)


def _why_not(block: Block, absent: dict[str, str]) -> str | None:
    if block.note.startswith("not run: "):
        return block.note
    if block.missing:
        return f"needs {', '.join(block.missing)}"
    words = set(re.findall(r"\w+", block.text))
    return next((reason for name, reason in absent.items() if name in words), None)


def _stored(block: Block) -> set[str]:
    nodes = ast.walk(ast.parse(block.text))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _run(block: Block, names: dict) -> None:
    if block.text.startswith(">>>"):
        _doctest(block.text, names, block.where)
    else:  # lines are counted as in the page, so that a traceback names the right one
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)


def _doctest(text: str, names: dict, where: str) -> None:
    test = doctest.DocTestParser().get_doctest(text, names, where, where, 0)
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


def test_what_is_not_run_is_little_and_has_a_reason():
    notes = [block for page in PAGES for block in blocks(page) if block.note]
    assert all(re.fullmatch(r"slow|not run: .{10,}", block.note) for block in notes)
    others = re.compile(
        r"slow|not run: [\w-]+ is not installed here"
    )  # on the pages of the projects that are named
    not_run = [block.where for block in notes if not others.fullmatch(block.note)]
    assert len(not_run) <= 2, not_run


def test_every_block_says_what_it_is():
    assert [block.where for page in PAGES for block in blocks(page) if block.language not in _LANGUAGES] == []


@pytest.mark.parametrize("page", _pages("sh"))
def test_commands_are_known_with_their_arguments(page):
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                assert _is_known(words), f"{block.where}: {line}"


def _is_known(words: list[str]) -> bool:
    command, *arguments = words
    if command == "vitkern":
        make_parser().parse_args(arguments)  # or SystemExit
        return True
    if command == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return all("=" in argument or argument in targets for argument in arguments)
    if command == "python" and arguments[0] == "-m":
        return importlib.util.find_spec(arguments[1]) is not None
    if command == "python":
        return (ROOT / arguments[0]).exists()
    if command.startswith("./") and "|" in arguments:  # a program of the page, and the reader of its output
        return _is_known(arguments[arguments.index("|") + 1 :])
    return command in ("pip", "g++") or re.match(r"\w+=", command) is not None


@pytest.mark.parametrize("arguments", [["bench", "runn"], ["bench", "run", "--quik"], ["dokter"]])
def test_commands_that_are_not_known_are_noticed(arguments):
    with pytest.raises(SystemExit):
        _is_known(["vitkern", *arguments])
    assert not _is_known(["make", "tset"])
    assert not _is_known(["python", "-m", "benchmarks.bench_nothing"])


def test_examples_in_docstrings_are_right():
    tests = doctest.DocTestFinder(recurse=False).find
    functions = [
        "ms_deform_attn",
        "ms_deform_attn_fused",
        "adapter_bottleneck",
        "token_pool",
        "token_project",
    ]
    for name in functions:
        for test in tests(getattr(vitkern, name), name, globs={"torch": torch, "vitkern": vitkern}):
            said: list[str] = []
            assert doctest.DocTestRunner().run(test, out=said.append).attempted > 0
            assert not said, "".join(said)
