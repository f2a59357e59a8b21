# SPDX-License-Identifier: Apache-2.0
"""`vitkern demo`: a row has times only if both sides agree, and a wrong kernel is reported.

The card's half runs without a card: its device and clock are arguments, and the emulated kernels stand in for cuda.
"""

from __future__ import annotations

import re

import pytest
import torch

import vitkern
from tests import emulated
from vitkern.cli import main
from vitkern.commands import demo, demo_card, demo_picture
from vitkern.ops import backends, native


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", ((32, 32),))
    monkeypatch.setattr(demo, "SECONDS_OF_TIMING", 0)
    monkeypatch.setattr(demo_picture, "STEPS", 2)


def test_rows_that_agree_have_times_and_a_picture_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--threads", "1", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("32x32")]
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
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("32x32")]
    assert ["FAILED: the two differ by 1.0e-01" in row for row in rows] == [True, True, False, False]


class SteadyClock:
    """A clock on which every call takes two milliseconds."""

    def calls(self, run):
        run()
        return 1

    def milliseconds(self, run, calls):
        run()
        return 2.0


def card_rows(said: str) -> list[str]:
    return [line for line in said.splitlines() if re.match(r"32x32 +(fp32|bf16)", line)]


def card_table(**options) -> bool:
    given = {"names": ("cpu", "reference"), "compiler": lambda function: function, "seconds": 0, **options}
    return demo_card.table(demo.IMAGES, torch.device("cpu"), SteadyClock(), **given)


def test_a_card_has_rows_of_each_contender_dtype_and_pass(capsys):
    assert card_table()
    rows = card_rows(capsys.readouterr().out)
    contenders = ("grid_sample", "grid_sample compiled", "cpu", "reference")
    assert len(rows) == len(contenders) * 2 * 2
    for row, name in zip(rows, 4 * contenders):
        assert re.search(rf" {name} +2\.000 +1\.0x +(\d+|nan)   \d", row), row


def test_the_emulated_kernels_are_shown_as_those_of_a_card(monkeypatch, capsys):
    if emulated.REASON:
        pytest.skip(emulated.REASON)
    monkeypatch.setattr(native, "cuda_module", emulated.module())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert card_table(names=demo_card.BACKENDS)
    said = capsys.readouterr().out
    assert sum(" cuda " in row for row in card_rows(said)) == 4
    assert "triton: " in said  # and why it does not run


def test_a_backend_that_cannot_run_on_the_card_says_why(capsys):
    assert card_table(names=("cuda",))
    said = capsys.readouterr().out
    assert said.startswith(f"cuda: {backends.can_run('cuda', torch.device('cpu'), torch.float32)}\n")
    assert len(card_rows(said)) == 2 * 2 * 2


def test_what_is_wrong_on_a_card_is_not_timed(monkeypatch, capsys):
    right = vitkern.ms_deform_attn
    monkeypatch.setattr(vitkern, "ms_deform_attn", lambda *tensors, backend: 1.1 * right(*tensors))
    assert not card_table(names=("cpu",))
    rows = [row for row in card_rows(capsys.readouterr().out) if " cpu " in row]
    assert ["FAILED: the two differ by 1.0e-01" in row for row in rows] == [True] * 4


def test_what_raises_on_a_card_leaves_the_others(monkeypatch, capsys):
    def out_of_memory(*tensors, backend):
        raise RuntimeError("out of\nmemory")

    def no_compiler(function):
        def raises(*tensors):
            raise RuntimeError("no compiler")

        return raises

    monkeypatch.setattr(vitkern, "ms_deform_attn", out_of_memory)
    assert not card_table(names=("cpu",), compiler=no_compiler)
    rows = card_rows(capsys.readouterr().out)
    assert sum("FAILED: raised RuntimeError: out of memory" in row for row in rows) == 4
    assert sum("not timed: raised RuntimeError: no compiler" in row for row in rows) == 4
    assert sum("1.0x" in row for row in rows) == 4


def test_the_demo_shows_the_card_where_there_is_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_card, "card", lambda: (torch.device("cpu"), SteadyClock()))
    monkeypatch.setattr(
        demo_card.table, "__kwdefaults__", {"names": ("cpu",), "compiler": lambda f: f, "seconds": 0}
    )
    monkeypatch.setattr(demo_picture, "draw", lambda output: output)
    assert main(["demo", "--threads", "1", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "The attention alone on cpu:" in said and len(card_rows(said)) == 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_a_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_picture, "draw", lambda output: output)
    assert main(["demo", "--threads", "1", "--output", str(tmp_path)]) == 0
    assert "No card: torch sees none here" in capsys.readouterr().out
