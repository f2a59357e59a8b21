# SPDX-License-Identifier: Apache-2.0
"""`make gpu PART=tune` without a card: the sizes that it tries, no times for wrong results, and sizes it cannot try."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.common import DONE, LEFT, Budget
from tests.test_bench_run import TINY
from vitkern.bench.plan import Subject
from vitkern.bench.run import call
from vitkern.cases.ops import OPS
from vitkern.commands.errors import CommandError

SOFTWARE = {what: {"version": "1"} for what in ("torch", "triton", "vitkern")}


def tiny(op: str, what: str) -> Subject:
    return Subject(OPS[op], TINY[op], torch.float32, torch.device("cpu"), (), (what,), 1)


def test_alternatives_change_one_size_at_a_time():
    chosen = {"BLOCK_Q": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 64}
    found = tune.alternatives(chosen, ("BLOCK_Q", "num_stages", "maxnreg", "BLOCK_X"))
    assert ("BLOCK_Q", "halved") in found and ("num_stages", "one more") in found
    assert ("maxnreg", "64") not in found and not any(name == "BLOCK_X" for name, _ in found)
    assert tune.applied(chosen, ("BLOCK_Q", "halved")) == chosen | {"BLOCK_Q": 16}
    assert tune.applied(chosen, ("num_stages", "one less")) == chosen | {"num_stages": 1}
    assert "maxnreg" not in tune.applied(chosen, ("maxnreg", "none"))
    whole = {"BLOCK_C": 256, "WHOLE": True}
    assert tune.applied(whole, ("BLOCK_C", "halved")) == {"BLOCK_C": 128, "WHOLE": False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels, which a GPU runs")
@pytest.mark.parametrize("table", tune.TABLES, ids=lambda table: f"{table.op}-{table.name}")
def test_every_table_serves_the_pass_it_is_said_to_and_has_the_sizes_it_is_said_to(table):
    pytest.importorskip("triton")
    subject = tiny(table.op, table.passes)
    run = call(subject.op.workload(subject.case, subject.dtype, "cpu"), "triton", table.passes)
    with tune.changed(table, None) as chosen:
        run()
    assert set(table.free) - {"maxnreg"} <= set(chosen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels, which a GPU runs")
def test_what_is_wrong_with_another_size_has_no_time(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    table = tune.Table("token_project", "token_project", "launch_table", False, ("BLOCK_N", "BLOCK_T"))
    monkeypatch.setattr(tune, "TABLES", (table,))
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setitem(tune.SIZES, "halved", lambda size: size // 8)  # fewer places than tokens
    wanted = [tiny("token_project", "forward")]
    path = tmp_path / "tune" / "file.json"
    assert tune.run(wanted, path, SOFTWARE, Budget(1e4)) == DONE
    (row,) = json.loads(path.read_text())["rows"]
    by_change = {tuple(one["change"] or ()): one for one in row["alternatives"]}
    assert by_change[()]["ms"] > 0 and by_change["BLOCK_N", "doubled"]["ms"] > 0
    assert by_change["BLOCK_T", "halved"]["ms"] is None and by_change["BLOCK_T", "halved"]["reason"]
    assert (
        "| token_project: token_project.launch_table | fp32 | BLOCK_N doubled | 1 |"
        in capsys.readouterr().out
    )
    assert tune.run(wanted, path, SOFTWARE, Budget(1e4)) == DONE  # nothing is measured twice
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_size_that_breaks_the_card_ends_the_call_and_is_not_tried_again(monkeypatch, tmp_path):
    table = tune.Table("token_project", "token_project", "launch_table", False, ("BLOCK_N",))
    broken = {
        "change": ["BLOCK_N", "doubled"],
        "ms": None,
        "reason": "raised AcceleratorError: CUDA error: bad",
    }
    measured = []
    monkeypatch.setattr(tune, "TABLES", (table,))
    monkeypatch.setattr(tune.backends, "can_run", lambda *_: None)
    monkeypatch.setattr(
        tune, "measure", lambda *_: measured.append(1) or {"alternatives": [{"ms": 1.0}, broken]}
    )
    path = tmp_path / "file.json"
    wanted = [tiny("token_project", "forward")]
    with pytest.raises(CommandError, match="BLOCK_N.*left the card in an undefined state: call again"):
        tune.run(wanted, path, SOFTWARE, Budget(1e4))
    assert tune.run(wanted, path, SOFTWARE, Budget(1e4)) == DONE
    assert len(measured) == 1


def test_a_file_of_other_software_is_refused(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(tune.opened(path, SOFTWARE)))
    assert tune.opened(path, SOFTWARE)["rows"] == []
    with pytest.raises(CommandError, match="was begun with triton 1, this is 2: FRESH=1"):
        tune.run([], path, SOFTWARE | {"triton": {"version": "2"}}, Budget(1e4))


def test_an_interruption_leaves_the_table_and_what_was_under_way_for_the_next_call(
    monkeypatch, tmp_path, capsys
):
    tables = [
        tune.Table("token_project", "token_project", "launch_table", backward, ("BLOCK_N",))
        for backward in (False, True)
    ]
    figures = [{"change": None, "ms": 1.0}, {"change": ["BLOCK_N", "halved"], "ms": 2.0}]
    outcomes = iter([{"alternatives": figures}, KeyboardInterrupt, {"alternatives": figures}])

    def measure(*_):
        if (outcome := next(outcomes)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(tune, "TABLES", tables)
    monkeypatch.setattr(tune.backends, "can_run", lambda *_: None)
    monkeypatch.setattr(tune, "measure", measure)
    path, wanted = tmp_path / "file.json", [tiny("token_project", "forward")]
    assert tune.run(wanted, path, SOFTWARE, Budget(1e4)) == LEFT
    assert "1 rows, 1 left" in capsys.readouterr().out
    assert "BLOCK_N halved | 1 | 2.00" in path.with_suffix(".md").read_text()
    assert tune.run(wanted, path, SOFTWARE, Budget(1e4)) == DONE
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_the_dry_run_says_what_cannot_be_tuned_at_run_time(capsys):
    assert main(["tune", "--dry", "--op", "token_pool", "--case", "vt-64", "--dtype", "bf16"]) == DONE
    said = capsys.readouterr().out
    assert "token_pool vt-64 x8 bf16" in said and "token_pool.launch_table, backward" in said
    for constant in tune.COMPILED_IN:
        assert f"  {constant:<16}csrc/" in said
