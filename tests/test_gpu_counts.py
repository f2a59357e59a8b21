# SPDX-License-Identifier: Apache-2.0
"""`make gpu PART=counts` without a card: the commands that it would run, and reading and comparing ncu's output."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.counts import record
from benchmarks.gpu import counts
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.common import DONE, FAILED, LEFT, REFUSED, Budget
from vitkern.commands.errors import CommandError

RECORDED = (Path(__file__).parent / "recorded_ncu.csv").read_text()  # in the form of ncu --csv
SCATTER = {
    "kernel": "scatter",
    "blocks": 4,
    "counted": 4,
    "global": [["load", 16, "from", 32, 1024, 512, 128], ["reduction", 16, "to", 1024, 32768, 16384, 4096]],
    "shared": [["load", 16, 16, 512, 16, 64], ["store", 4, 32, 1024, 32, 32]],
}
GATHER = {  # every 16th block was counted
    "kernel": "gather",
    "blocks": 2048,
    "counted": 128,
    "global": [["load", 16, "rows", 1024, 32768, 16384, 4096], ["store", 16, "to", 512, 0, 0, 0]],
    "shared": [],
}

COPIES = SCATTER | {"shared": [["copy to", 16, 16, 512, 64, 64]]}


def test_the_dry_run_lists_a_command_for_each_shape_of_our_kernels(capsys):
    assert main(["counts", "--dry"]) == DONE
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("ncu ")]
    assert [line[-1] for line in lines] == [case.name for case in counts.subjects()]
    assert {name.split(" ")[0] for *_, name in lines} == set(record.OPS)
    (line,) = (line for line in lines if line[-1] == "token_pool vt-64 fp32")
    assert "regex:^(add_parts|token_pool_backward|token_pool_forward|token_pool_merge)$" in line
    assert all(metric in line[line.index("--metrics") + 1].split(",") for metric in counts.METRICS.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is refused here")
def test_without_a_card_it_is_refused(capsys):
    assert main(["counts"]) == REFUSED
    assert "torch finds no usable GPU" in capsys.readouterr().err


def test_counts_are_compared_with_what_was_recorded():
    found = counts.compared([SCATTER, GATHER], counts.measured(RECORDED))
    off = {(one["kernel"], one["what"]): round(one["off"], 4) for one in found}
    assert off == {
        ("scatter", "loads"): 0,
        ("scatter", "sectors of loads"): 0,
        ("scatter", "stores"): 0,
        ("scatter", "sectors of stores"): 0,
        ("scatter", "reductions"): 0,
        ("scatter", "sectors of reductions"): 0,
        ("scatter", "wavefronts of shared loads"): 0,  # 48 lie in 16 to 64
        ("scatter", "wavefronts of shared stores"): round(1 / 33, 4),
        ("gather", "loads"): 0,
        ("gather", "sectors of loads"): round(1 - 262144 / 266000, 4),
        ("gather", "reductions"): 0,
        ("gather", "sectors of reductions"): 0,
        ("gather", "wavefronts of shared loads"): 0,
        ("gather", "wavefronts of shared stores"): 0,
    }
    text = counts.in_words([{"key": ["a shape"], "counts": found}])
    assert "| scatter | wavefronts of shared stores | 32 | 33 | 3.0 % FAILED | a shape |" in text
    assert "| gather | sectors of loads | 262k | 266k | 1.4 % | a shape |" in text
    assert "| scatter | wavefronts of shared loads | 16 to 64 | 48 | 0.0 % | a shape |" in text


def test_shared_memory_is_not_compared_where_copies_write_it():
    found = counts.compared([COPIES, GATHER], counts.measured(RECORDED))
    assert not [one for one in found if one["kernel"] == "scatter" and "shared" in one["what"]]


def test_other_kernels_than_were_counted_are_refused():
    with pytest.raises(CommandError, match="scatter, gather for gather, scatter"):
        counts.compared([GATHER, SCATTER], counts.measured(RECORDED))


@pytest.mark.parametrize("said", ["", "==ERROR== No kernels were profiled."])
def test_silence_is_no_agreement(said):
    with pytest.raises(CommandError, match="ncu counted nothing"):
        counts.measured(said)


@pytest.mark.parametrize(("scatter", "status"), [(COPIES, DONE), (SCATTER, FAILED)], ids=["right", "off"])
def test_a_run_stops_in_order_goes_on_and_fails_where_a_count_is_off(tmp_path, monkeypatch, scatter, status):
    """A recorded file stands in for ncu."""
    wanted = counts.subjects()[:2]
    monkeypatch.setattr(counts, "demand_counters", lambda: None)
    monkeypatch.setattr(counts, "launches_of", lambda case: [scatter, GATHER])
    done = counts.subprocess.CompletedProcess([], 0, RECORDED, "")
    monkeypatch.setattr(counts.subprocess, "run", lambda *_, **__: done)
    path = tmp_path / "card" / "counts" / "today.json"
    assert counts.run(wanted, path, {}, Budget(0.0)) == LEFT
    assert counts.run(wanted, path, {}, Budget(60.0)) == status
    assert path.with_suffix(".md").read_text().count("FAILED") == (status == FAILED)
