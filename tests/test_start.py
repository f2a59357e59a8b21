# SPDX-License-Identifier: Apache-2.0
"""The cost of a start: the command line runs without torch, and the package imports few modules besides torch's.

Modules are counted instead of seconds, which depend on the load of the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import vitkern
from vitkern.bench import plan as bench
from vitkern.check import plan as check
from vitkern.cli import main
from vitkern.commands.arguments import NAMES
from vitkern.commands.choices import DTYPES


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


MODULES = """
import contextlib, io, json, sys
from vitkern.cli import main
silent = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
    main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["bench", "run", "--help"],
        ["dokter"],
        ["check", "--quik"],
        ["check", "--op", "conv"],
        ["check", "--kind", "oracles"],
        ["bench", "run", "--dtype", "int8"],
        ["bench", "run", "--json", os.path.join(os.devnull, "file.json")],
        ["check", "--junit", os.path.join(os.devnull, "file.xml")],
    ],
    ids=" ".join,
)
def test_help_and_typos_do_not_wait_for_torch(arguments):
    modules = json.loads(run(MODULES, *arguments))
    assert "vitkern.cli" in modules
    assert not {"torch", "numpy", "vitkern._C"} & set(modules)


IMPORT = """
import json, os, sys
import torch
modules, environment = set(sys.modules), dict(os.environ)
import vitkern
assert dict(os.environ) == environment
print(json.dumps(sorted(set(sys.modules) - modules)))
"""


def test_the_package_brings_little_beside_torch():
    added = json.loads(run(IMPORT))
    assert len(added) <= 150
    assert [name for name in added if not name.startswith(("vitkern", "torch"))] == []
    assert "torch._dynamo" not in added


@pytest.mark.parametrize(
    "order", ["import torch, vitkern", "import vitkern, torch", "import vitkern.functional"]
)
def test_ops_are_registered_in_either_order(order):
    names = [f"{op}{suffix}" for op in NAMES["ops"] for suffix in ("", "_backward")]
    run(f"{order}\nimport torch\nfor name in {names}: getattr(torch.ops.vitkern, name)")


@pytest.mark.slow
def test_an_exported_program_runs_in_a_process_that_only_imports_the_package(tmp_path):
    class Pool(torch.nn.Module):
        def forward(self, x, weight):
            return vitkern.token_pool(x, weight)

    inputs = torch.randn(2, 9, 8), torch.randn(3, 8)
    torch.export.save(torch.export.export(Pool(), inputs), tmp_path / "pool.pt2")
    torch.save((*inputs, vitkern.token_pool(*inputs)), tmp_path / "tensors.pt")
    program = (
        "import sys, vitkern, torch; x, weight, wanted = torch.load(sys.argv[2]);"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x, weight), wanted)"
    )
    run(program, str(tmp_path / "pool.pt2"), str(tmp_path / "tensors.pt"))


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"vitkern {vitkern.__version__}\n"


def test_every_public_name_is_there():
    assert set(vitkern.__all__) <= set(dir(vitkern))
    assert [name for name in vitkern.__all__ if not hasattr(vitkern, name)] == []
    with pytest.raises(AttributeError, match="module 'vitkern' has no attribute 'nothing'"):
        vitkern.nothing  # noqa: B018


def test_the_names_that_are_known_without_torch_are_those_that_there_are():
    for plan in (bench, check):
        assert set(NAMES["ops"]) == set(plan.OPS)
    assert NAMES["dtypes"] == tuple(DTYPES)
    assert NAMES["passes"] == bench.PASSES
    assert NAMES["kinds"] == check.KINDS


@pytest.mark.parametrize(
    "arguments", [["bench", "run", "--json"], ["check", "--junit"], ["demo", "--output"]], ids=" ".join
)
@pytest.mark.parametrize("place", ["file/below", "folder"])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(arguments, place, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    if place == "folder" and arguments[0] == "demo":
        pytest.skip("it writes into a folder")
    assert main([*arguments, str(tmp_path / place)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(
        f"vitkern {arguments[0]}: cannot write {tmp_path / place}: "
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]
