# SPDX-License-Identifier: Apache-2.0
"""`vitkern demo`: a row has times if both sides agree, and a wrong kernel is said to be wrong."""

from __future__ import annotations

import pytest

import vitkern
from vitkern.cli import main
from vitkern.commands import demo, demo_picture


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", ((64, 64),))
    monkeypatch.setattr(demo, "SECONDS_OF_TIMING", 0)
    monkeypatch.setattr(demo_picture, "STEPS", 2)


def test_rows_that_agree_have_times_and_a_picture_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--threads", "1", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("64x64")]
    assert len(rows) == 4
    assert all("x   " in row for row in rows)
    assert str(tmp_path / "sampling.png") in said
    assert (tmp_path / "sampling.png").stat().st_size > 10_000


def test_no_threads_are_refused(capsys):
    assert main(["demo", "--threads", "0"]) == 2
    assert capsys.readouterr().err == "vitkern demo: --threads must be more than 0, got 0\n"


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    right = vitkern.ms_deform_attn
    monkeypatch.setattr(vitkern, "ms_deform_attn", lambda *tensors: 1.1 * right(*tensors))
    assert not demo.table(demo.IMAGES)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("64x64")]
    assert ["FAILED: the two differ by 1.0e-01" in row for row in rows] == [True, True, False, False]
