# SPDX-License-Identifier: Apache-2.0
"""tools/mutate: the drawn mutations, and a pass over a small package that is killed in the middle."""

from __future__ import annotations

import json

import pytest

from tools.mutating import cpp_sites, python_sites, table
from tools.mutating.__main__ import main
from tools.mutating.draw import VITKERN, Project, draw
from tools.mutating.mutation import RULES, Mutation
from tools.mutating.python_text import same_code
from tools.mutating.workplace import Workplace

PYTHON = '''
import torch

def mean(x: float, *, dim: int = -1):
    """Not - a + term."""
    if x > 0 and dim == -1:
        with torch.no_grad():
            x = x[1:] - x.float()
    raise ValueError(f"{x - 1}" + "-")
'''
CPP = """
#include "a - b.h"  // c < d
template <typename T, int N = 1 + 1>
__global__ void add(const int64_t* x) {
  for (int i = 0; i < n - 1; ++i) {
    if (row < p.rows && !done) sums[row] += -x[i] * p.scale;
  }
  __syncthreads();
  float shared[4 + 4];  // sums[0] - 1
  fail("a < b");
}
"""


def changes(found: list[Mutation]) -> set[tuple[str, str, str]]:
    return {(each.rule, each.before, each.after) for each in found}


def test_python_is_changed_by_each_rule_and_its_texts_are_not():
    found = python_sites.sites("a.py", PYTHON)
    assert changes(found) >= {
        ("sign", "-", "+"),
        ("index", "1", "2"),
        ("bound", ">", ">="),
        ("dtype", "x.float()", "x"),
        ("barrier", "with torch.no_grad()", "if True"),
        ("mask", "and", "or"),
        ("dropped term", "x[1:] - x.float()", "x[1:]"),
    }
    assert {each.rule for each in found} == set(RULES)
    assert {each.line for each in found} == {4, 6, 7, 8}
    assert {each.function for each in found if each.line > 4} == {"mean"}
    for each in found:
        assert same_code(PYTHON, each.applied(PYTHON)) is False


def test_cpp_is_changed_by_each_rule_and_its_texts_are_not():
    found = cpp_sites.sites("a.cuh", CPP)
    assert changes(found) >= {
        ("sign", "-", ""),
        ("index", "row", "(row) + 1"),
        ("bound", "<", "<="),
        ("bound", " - 1", ""),
        ("dtype", "int64_t", "int32_t"),
        ("barrier", "__syncthreads();", ";"),
        ("mask", "&&", "||"),
        ("mask", "!", ""),
        ("dropped term", " * p.scale", ""),
        ("dropped term", 'fail("a < b");', ";"),
    }
    assert {each.rule for each in found} == set(RULES)
    assert not {each.line for each in found} & {2, 3}
    assert not any("4" in each.before and each.rule == "index" for each in found)


def test_the_bytecode_tells_what_is_equivalent():
    assert same_code("a = 1\nb = 2\n", "a =  1  # one\n\nb = 2\n")
    assert not same_code("a = 1\n", "a = True\n")
    assert not same_code("def f(): return 1\n", "def f(): return 2\n")


def test_a_seed_draws_the_same_from_all_parts_of_the_package():
    drawn = draw(VITKERN, 17, 160)
    assert drawn == draw(VITKERN, 17, 160) != draw(VITKERN, 18, 160)
    assert drawn[:20] == draw(VITKERN, 17, 20)
    assert len(set(drawn)) == 160
    assert len({each.file for each in drawn}) >= 40
    assert {each.rule for each in drawn} == set(RULES)
    for group in VITKERN.groups:
        assert {each.file for each in drawn[:60]} & set(VITKERN.files(group)), group


KERNELS = """
def clamp(x):
    if x > 9:
        return 9
    return x


def twice(x):
    return x + x


def unused(x):
    return x - 1
"""
TESTS = """
import subprocess, sys
from package.kernels import clamp, twice

def test_clamp():
    assert clamp(10) == 9
    assert clamp(3) == 3

def test_twice():
    code = "import sys; from package.kernels import twice; sys.exit(twice(2))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 4

def test_broken():
    assert twice(1) == 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take a second each time
    for file, text in (
        ("package/kernels.py", KERNELS),
        ("package/__init__.py", ""),
        ("tests/test_it.py", TESTS),
    ):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Project(tmp_path, {"kernels": ("package/kernels.py",)})


def rows_of(project: Project, *arguments: str) -> list[table.Row]:
    """Runs a pass, or a part of one, and returns the rows of its table."""
    main(["--hours", "0.1", *arguments], project, project.root / "reviewed.json")
    state = (project.root / "build" / "mutate").glob("state-*.json")
    return json.loads(max(state, key=lambda path: path.stat().st_mtime_ns).read_text())


def test_a_pass_goes_on_where_it_was_killed(project, capsys):
    """Broken tests, and tests that do not reach the function, do not count as catching a mutation."""
    drawn = draw(project, 17, 160)
    first = rows_of(project, "--keep", "1")
    assert [row["key"] for row in first] == [drawn[0].key(KERNELS)]
    place = Workplace(project)
    place.plant(drawn[-1])  # as if killed here
    assert place.text("package/kernels.py") != KERNELS
    rows = rows_of(project)
    assert place.text("package/kernels.py") == KERNELS == project.text("package/kernels.py")
    assert rows[:1] == first and [row["key"] for row in rows] == [each.key(KERNELS) for each in drawn]

    found = {row["line"]: (row["outcome"], row.get("by") or row["why"]) for row in rows}
    assert found == {
        3: ("caught", "tests/test_it.py::test_clamp"),
        9: ("caught", "tests/test_it.py::test_twice"),
        13: ("survived", "no test reaches it"),
    }
    assert "1 survive without a reason" in capsys.readouterr().out
    survivor = next(row for row in rows if row["line"] == 13)
    reviewed = {"file": survivor["file"], "key": survivor["key"], "reason": "nothing calls it"}
    (project.root / "reviewed.json").write_text(json.dumps([reviewed]))
    assert rows_of(project) == rows
    assert "0 survive without a reason" in capsys.readouterr().out
    (project.root / "package" / "kernels.py").write_text(f"{KERNELS}#\n")
    assert rows_of(project, "--keep", "0") == rows
    (project.root / "package" / "kernels.py").write_text(f"#\n{KERNELS}")  # other code starts anew
    (project.root / "tests" / "test_it.py").unlink()
    assert rows_of(project, "--keep", "1")[0]["line"] == rows[0]["line"] + 1


def test_an_earlier_table_finds_its_mutations_where_they_are_now(project):
    drawn = draw(project, 17, 160)
    rows = [table.row_of(each, KERNELS, "caught") for each in drawn]
    (project.root / "package" / "kernels.py").write_text(f"# moved\n{KERNELS}".replace("x - 1", "x - 2"))
    found, gone = table.again(project, rows)
    assert {each.line for each in found} == {4, 10} and [row["line"] for row in gone] == [13]
    text = project.text("package/kernels.py")
    now = [table.row_of(each, text, "survived") for each in found]
    assert table.lost(now, rows) == now and table.lost(now, now) == []
