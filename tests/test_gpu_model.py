# SPDX-License-Identifier: Apache-2.0
"""`make gpu PART=model` without a card: from counts to bounds, on made-up rates; how it stops, goes on and judges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.counts import record
from benchmarks.counts.cases import full
from benchmarks.gpu import bounds, model, rates
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.common import DONE, FAILED, LEFT, REFUSED, Budget
from benchmarks.gpu.rates import RATES, Card
from tests.fake_card import FakeCard
from vitkern.commands.errors import CommandError

MADE_UP = json.loads((Path(__file__).parent / "made_up_rates.json").read_text())
CARD = Card(132, 52428800, (9, 0))
FIGURES = {row["key"][1]: row["figure"] for row in MADE_UP["rows"]}
KNOWN = record.committed()
CASES = {case.name: case for case in full()}
ENCODER = "ms_deform_attn plain detr-encoder fp32 initial"
CPU = torch.device("cpu")

# ---- From counts to bounds, on made-up rates

LAUNCH = {
    "kernel": "k",
    "blocks": 32,
    "counted": 2,
    "waits": 3,
    "global": [
        ["load", 16, "a", 10, 320, 1000, 40],
        ["copy from", 16, "b", 1, 32, 500, 4],
        ["store", 4, "c", 9, 9, 9, 9],
    ],
    "shared": [["load", 16, 10, 320, 100, 400], ["store", 4, 10, 320, 20, 20]],
    "reductions": {"adds": 0, "left": 0, "sectors": 0, "most": 0},
}
ADDS = LAUNCH | {
    "global": [["reduction", 16, "a", 10, 320, 320, 40]],  # half of each sector
    "reductions": {"adds": 320, "left": 9, "sectors": 16, "most": 100},
}


def test_each_resource_takes_its_count_over_its_rate():
    """By hand; the counts are of 2 of 32 blocks, the hottest row's is not scaled."""
    found = bounds.of_launch(LAUNCH, FIGURES, CARD, chain=2, from_l2=6.4e6)
    assert found == {
        "L1 loads": pytest.approx(16 * 1000 * 32 / 3.2e13 * 1e6),
        "L2 loads": pytest.approx((16 * 500 * 32 + 6.4e6) / 6.4e12 * 1e6),
        "adds": 0.0,
        "hottest row": 0.0,
        "shared memory": pytest.approx(16 * 120 / 2.0e9 / 132 * 1e6),
        "chain": pytest.approx(0.3),
    }
    assert bounds.bound(found) == (pytest.approx(1.04), "L2 loads")
    assert bounds.waiting(LAUNCH, FIGURES) == pytest.approx(0.45)


def test_adds_and_the_hottest_row():
    """100 adds of 16 bytes to a sector are 50 of a row, which is eight adds."""
    found = bounds.of_launch(ADDS, FIGURES, CARD)
    assert found["adds"] == pytest.approx(16 * 320 / 1.6e11 * 1e6)
    assert found["hottest row"] == pytest.approx(50 * 8 / 2.0e9 * 1e6)
    assert found["chain"] == 0.0
    assert bounds.bound(found)[1] == "hottest row"
    older = bounds.of_launch(ADDS, FIGURES, replace(CARD, capability=(8, 0)))
    assert older["adds"] == older["hottest row"] == 0.0  # it adds one float at a time, which was not counted


@pytest.mark.parametrize("name", FIGURES)
def test_no_bound_grows_with_a_rate_and_every_rate_of_a_resource_counts(name):
    """Twice the rate of a resource halves its time; twice a latency doubles it."""
    launch = LAUNCH | {"global": LAUNCH["global"] + ADDS["global"], "reductions": ADDS["reductions"]}
    before = bounds.of_launch(launch, FIGURES, CARD)
    after = bounds.of_launch(launch, FIGURES | {name: 2 * FIGURES[name]}, CARD)
    changed = {what: after[what] / before[what] for what in before if after[what] != before[what]}
    of = {
        "rows from L1": {"L1 loads": 0.5},
        "rows from L2": {"L2 loads": 0.5},
        "adds to random rows": {"adds": 0.5},
        "adds to one row": {"hottest row": 0.5},
        "wavefronts": {"shared memory": 0.5},
        "L2 latency": {"chain": 2.0},
    }
    assert changed == of.get(name, {})


def test_every_counted_kernel_has_a_bound():
    for case in CASES.values():
        for row in KNOWN["counts"][case.name]["launches"]:
            least, by = bounds.bound(bounds.times(KNOWN, case, row, FIGURES, CARD))
            assert 0 < least < 1e6 and by in bounds.RESOURCES, (case.name, row["kernel"])


def test_the_model_of_l1_counts_on_its_own_card_only():
    (row,) = bounds.launches(KNOWN, CASES[ENCODER], "forward")
    modelled = next(one for one in KNOWN["modelled"] if (one["dtype"], one["places"]) == ("fp32", "initial"))
    there = bounds.times(KNOWN, CASES[ENCODER], row, FIGURES, CARD)
    assert there["L2 loads"] == pytest.approx(modelled["read_bytes"] / 6.4e12 * 1e6)
    assert there["chain"] == pytest.approx(0.3)  # locations, then values
    elsewhere = bounds.times(KNOWN, CASES[ENCODER], row, FIGURES, replace(CARD, multiprocessors=108))
    assert elsewhere["L2 loads"] == 0.0


@pytest.mark.parametrize("form", ["plain", "deterministic"])
def test_bounds_of_a_calls_kernels_add_up(form):
    """The deterministic call has its forward pass from the plain one."""
    case = CASES[ENCODER.replace("plain", form)]
    names = [row["kernel"].removeprefix("ms_deform_attn_") for row in bounds.launches(KNOWN, case)]
    assert names == ["forward", "backward"] + ["cells", "gather_grad_value"] * (form == "deterministic")
    each = [
        bounds.bound(bounds.times(KNOWN, case, row, FIGURES, CARD))[0] for row in bounds.launches(KNOWN, case)
    ]
    assert bounds.of_call(KNOWN, case, "both", FIGURES, CARD)[0] == pytest.approx(sum(each))
    assert bounds.of_call(KNOWN, case, "forward", FIGURES, CARD)[0] == pytest.approx(each[0])


def test_chains_are_those_of_their_kernel():
    """The deterministic form has the backward kernel of the plain one, and a longer chain in one of its own."""
    case = CASES[ENCODER.replace("plain", "deterministic")]
    rows = bounds.launches(KNOWN, case)
    found = [bounds.times(KNOWN, case, row, FIGURES, CARD)["chain"] / 0.15 for row in rows]
    assert found == pytest.approx([2, 2, 1, 4])


# ---- The part


def test_the_dry_run_lists_every_rate_and_call_and_no_time(capsys):
    assert main(["model", "--dry"]) == DONE
    said = capsys.readouterr().out
    for rate in RATES:
        assert f"{rate.name} " in said and rate.what in said
    lines = {name: line for line in said.splitlines() for name in CASES if line.startswith(f"{name} ")}
    assert set(lines) == {one.name for one in CASES.values() if one.make}
    assert "ms_deform_attn_forward ms_deform_attn_backward" in lines[ENCODER]
    assert "µs" not in said and "baseline" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is refused here")
def test_without_a_card_it_is_refused(capsys):
    assert main(["model"]) == REFUSED
    assert "torch finds no usable GPU" in capsys.readouterr().err


@pytest.fixture
def on_a_fake_card(monkeypatch):
    """The part with a card of arithmetic: kernels of a millisecond, calls as `took` says."""
    card, took = FakeCard(), {"ms": 1.0}
    kernels = lambda *_, **__: card.call(0.1, 1.0)  # noqa: E731

    def make(device: str):
        return lambda: card.call(0.2, took["ms"])

    bench = model.Model(CARD, CPU, lambda device, **options: card.clock(**options))
    bench.kernels = kernels

    def like(rate: rates.Rate) -> rates.Rate:
        return replace(rate, make=lambda *_: (kernels, MADE_UP_COUNTS[rate.name]))

    monkeypatch.setattr(model, "of_the_card", lambda: bench)
    monkeypatch.setattr(model, "_forward", lambda call: call())
    cases = [replace(CASES[name], make=make) for name in (ENCODER, ENCODER.replace("plain", "deterministic"))]
    wanted = [*map(like, RATES), *cases]
    software = {name: {"version": "1"} for name in ("torch", "triton", "vitkern")}
    return card, took, wanted, MADE_UP["environment"] | software


# In a kernel of a millisecond: so the figures are the made-up ones.
MADE_UP_COUNTS = {
    rate.name: 1e6 / FIGURES[rate.name]
    if rate.latency
    else FIGURES[rate.name] * (132 if rate.of_each else 1) / 1e3
    for rate in RATES
}


def test_a_run_stops_in_order_and_goes_on(on_a_fake_card, tmp_path, monkeypatch, capsys):
    _, _, wanted, facts = on_a_fake_card
    path = tmp_path / "card" / "model" / "today.json"
    assert model.run(wanted, path, facts, Budget(0.0)) == LEFT
    seen = []
    row = model.Model.row
    monkeypatch.setattr(model.Model, "row", lambda self, one: seen.append(one.name) or row(self, one))
    budget = Budget(60.0)
    allowed = iter([True] * 4 + [False])
    monkeypatch.setattr(budget, "allows_more", lambda: next(allowed))
    assert model.run(wanted, path, facts, budget) == LEFT
    assert "No bounds: " in path.with_suffix(".md").read_text()
    assert model.run(wanted, path, facts, Budget(60.0)) == DONE
    assert seen == [one.name for one in wanted]
    kept = json.loads(path.read_text())
    assert {row["key"][1]: row.get("figure") for row in kept["rows"][: len(RATES)]} == pytest.approx(FIGURES)
    text = path.with_suffix(".md").read_text()
    assert text.startswith("# Bounds on a card that does not exist\n")
    assert f"| {ENCODER} | both | " in text and text.count("| FAILED") == 0
    with pytest.raises(CommandError, match="FRESH=1"):
        model.run(wanted, path, facts | {"torch": {"version": "2"}}, Budget(60.0))


def cells_of(path: Path, start: str) -> list[str]:
    (line,) = (line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_times_stand_beside_their_bounds(on_a_fake_card, tmp_path):
    _, _, wanted, facts = on_a_fake_card
    path = tmp_path / "today.json"
    assert model.run(wanted, path, facts, Budget(60.0)) == DONE
    least, by = bounds.of_call(KNOWN, CASES[ENCODER], "both", FIGURES, CARD)
    cells = cells_of(path, f"| {ENCODER} | both ")
    assert cells[2:] == [f"{least:.3g}", by, "1000", "200", f"{1000 / least:.2f}", ""]
    cells = cells_of(path, "| ms_deform_attn_backward | plain | detr-encoder | fp32 | initial ")
    (_, row) = bounds.launches(KNOWN, CASES[ENCODER])
    found = bounds.times(KNOWN, CASES[ENCODER], row, FIGURES, CARD)
    assert cells[5:11] == [bounds.short(found[resource]) for resource in bounds.RESOURCES]
    assert cells[12] == "adds"


def test_a_time_below_its_bound_fails(on_a_fake_card, tmp_path):
    _, took, wanted, facts = on_a_fake_card
    took["ms"] = 0.01
    path = tmp_path / "today.json"
    assert model.run(wanted, path, facts, Budget(60.0)) == FAILED
    assert cells_of(path, f"| {ENCODER} | both ")[-1] == "FAILED: below its bound"


def test_a_clock_that_moved_makes_it_ambiguous(on_a_fake_card, tmp_path):
    card, took, wanted, facts = on_a_fake_card
    path = tmp_path / "today.json"
    assert model.run(wanted[: len(RATES)], path, facts, Budget(60.0)) == DONE
    card.megahertz, took["ms"] = 1500.0, 0.01
    assert model.run(wanted, path, facts, Budget(60.0)) == DONE
    assert cells_of(path, f"| {ENCODER} | both ")[-1] == "ambiguous: clocks moved by 33 %"


def test_what_raises_is_told_and_the_others_go_on(on_a_fake_card, tmp_path):
    _, _, wanted, facts = on_a_fake_card

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def breaks(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path = tmp_path / "today.json"
    first = replace(wanted[len(RATES)], make=fails)
    assert model.run([*wanted[: len(RATES)], first, wanted[-1]], path, facts, Budget(60.0)) == FAILED
    assert "FAILED: raised OutOfMemoryError: CUDA out of memory" in path.with_suffix(".md").read_text()
    with pytest.raises(CommandError, match="L1 latency left the card in no defined state"):
        model.run([replace(RATES[6], make=breaks)], tmp_path / "other.json", facts, Budget(60.0))
    assert model.run(wanted[:1], tmp_path / "other.json", facts, Budget(60.0)) == FAILED
