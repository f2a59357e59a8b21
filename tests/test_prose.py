# SPDX-License-Identifier: Apache-2.0
"""tools/prose: each rule finds a planted fault and passes the good form."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

LOADER = SourceFileLoader("prose", str(Path(__file__).parent.parent / "tools" / "prose"))
SPEC = spec_from_loader("prose", LOADER)
assert SPEC is not None
prose = module_from_spec(SPEC)
LOADER.exec_module(prose)

NEW = "VITKERN_" + "NEW"  # in two parts: the tool reads this file too
KNOWN = NEW.replace("NEW", "KNOWN")
DOCUMENTED = f"| `{KNOWN}` | `1` | at each call | An example. |\n"
LONG = "def long(x):\n" + "    x += 1\n" * 60

# name, a source with a fault, the line and the beginning of the message, the source without the fault
CASES = {
    "docstring": ("a.py", 'x = 1\n"""A module."""\n\n\ndef f():\n    """A sum.\n\n    Of all rows.\n    """\n', 8,
                  'opens with "Of": Of all rows.', 'def f():\n    """A sum of all rows."""\n'),
    "comment": ("a.h", "int a;  // the size\n// Rows of x,\n// padded. What is left is zero.\n", 3,
                'opens with "What"', "int a;  // the size\n// Rows of x,\n// padded. The rest is zero.\n"),
    "small letter": ("a.cu", "int a;  // what fits the registers\n", 1, 'opens with "what"',
                     "int a;  // the largest number that fits the registers\n"),
    "question": ("a.py", "# Those of the others.\n", 1, 'opens with "Those"', "# What is a plan?\n"),
    "word over two lines": ("a.cuh", "// Null where a caller\n// wants to skip it.\n", 1, 'says "wants to"',
                            "// Null if the caller\n// skips it.\n"),
    "person": ("a.py", "x = 1  # Nobody reads it\n", 1, 'says "Nobody"', "x = 1  # unused\n"),
    "kernel as a person": ("a.pyi", "# The kernel knows its rows.\n", 1, 'says "kernel knows"',
                           "# The kernel computes its rows.\n"),
    "but": ("a.py", "# There are but four rows.\n", 1, 'says "are but"', "# There are only four rows.\n"),
    "recipe": ("Makefile", "a: b  ## Whoever builds\n", 1, 'opens with "Whoever"', "a: b  ## Builds a\n"),
    "script": ("a", "#!/bin/sh\n# Who runs it.\n", 2, 'opens with "Who"', "#!/bin/sh\n# Runs it.\n"),
    "long function": ("a.py", LONG, 1, "long has 61 lines", LONG.replace("    x += 1\n", '    """A\n    B"""\n', 1)),
    "variable": ("a.py", f'x = os.environ["{NEW}"]\n', 1, f"{NEW} has no row", f'x = "{KNOWN}"\n'),
    "variable of C++": ("a.cpp", f'getenv("{NEW}");\n', 1, f"{NEW} has", f'getenv("{KNOWN}");\n'),
    "string": ("a.py", "# Of x.\nx = 'What?'\n", 1, 'opens with "Of"', "x = 'Those of others: nobody knows'\n"),
    "stock phrase": ("a.py", "# z is worked\n# out again\n", 1, 'says "worked out"', "# backward computes z again\n"),
    "needed": ("a.py", "# The wanted gradients.\n", 1, 'says "wanted gradients"', "# The needed gradients.\n"),
    "page": ("a.md", "# What\n\n| Who |\n|---|\n\n```sh\n# Of x\n```\n\nRows\nof x. Those are zero.\n", 11,
             'opens with "Those"', "# What\n\nRows of x, not \"Of x\". They are zero.\n"),
    "list of a page": ("a.md", "Two:\n\n- rows\n- *x*\n  of y. What is left\n  is zero.\n", 5, 'opens with "What"',
                       "Two:\n\n1. rows\n2. x\n   whose rows are zero\n"),
    "other files": ("a.py", "# Of x.\n", 1, 'opens with "Of"', None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_planted_fault_is_found_and_the_good_form_passes(case, tmp_path):
    name, faulty, line, message, good = CASES[case]
    path = tmp_path / name
    path.write_text(faulty)
    ((found_line, found),) = prose.findings(path, DOCUMENTED)
    assert found_line == line
    assert found.startswith(message)
    if good is None:
        path, good = tmp_path / "a.txt", faulty
    path.write_text(good)
    assert prose.findings(path, DOCUMENTED) == []


def test_the_tool_itself_has_no_findings(capsys):
    assert prose.main(["tools/prose", "tests/test_prose.py"]) == 0, capsys.readouterr().out


def test_the_exit_status_and_the_place_of_a_finding(capsys, monkeypatch):
    monkeypatch.setattr(prose, "findings", lambda path, documented: [(7, f"a fault in {path.name}")])
    assert prose.main(["tools/docs_hooks.py"]) == 1
    assert capsys.readouterr().out == "tools/docs_hooks.py:7: a fault in docs_hooks.py\n"
