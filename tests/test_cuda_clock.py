# SPDX-License-Identifier: Apache-2.0
"""The clock of a card, on one of arithmetic: the host's time stays out, and verdicts mind the card's clock."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from tests.bench_records import row
from tests.fake_card import FakeCard
from vitkern.bench import cuda_clock, report, run, schema
from vitkern.bench.compare import compare_records
from vitkern.bench.cuda_clock import Sample
from vitkern.bench.live import _compared
from vitkern.bench.measure import HostClock, interleaved
from vitkern.bench.verdicts import Factor, moved


@pytest.mark.parametrize("host, device, kernels", [(0.1, 0.02, 1), (0.4, 0.01, 40), (30.0, 0.5, 100)])
def test_the_time_is_the_cards_however_long_the_host_takes(host, device, kernels):
    card = FakeCard()
    clock = card.clock()
    run_ = functools.partial(card.call, host, device, kernels)
    assert clock.milliseconds(run_, clock.calls(run_)) == pytest.approx(device)
    assert clock.last == Sample(pytest.approx(device), pytest.approx(host), pytest.approx(2000), True)


def test_without_the_backlog_the_hosts_time_would_show(monkeypatch):
    """The fault that the clock is there for."""
    monkeypatch.setattr(cuda_clock, "LEAST_CYCLES", 1)
    monkeypatch.setattr(cuda_clock, "MOST_CYCLES", 1)
    card = FakeCard()
    clock = card.clock()
    run_ = functools.partial(card.call, 0.4, 0.01, 40)
    assert clock.milliseconds(run_, 5) > 0.3
    assert not clock.last.ahead


def test_a_longer_backlog_is_found_once_and_only_for_the_call_that_needs_it():
    card = FakeCard()
    clock = card.clock()
    slow, quick = functools.partial(card.call, 30.0, 1.0), functools.partial(card.call, 0.1, 1.0)
    for _ in range(2):
        clock.milliseconds(slow, 2)
        clock.milliseconds(quick, 2)
    short, long = cuda_clock.LEAST_CYCLES, card.spun[2]
    assert long / card.megahertz / 1e3 > 30.0
    assert card.spun == [short, short, long, long, short, short, long, long, short, short]


def card_waits(card: FakeCard):
    """A call in the middle of which the host waits for the card."""

    def waits() -> None:
        card.call(0.1, 1.0)
        card.synchronize(None)
        card.call(0.1, 1.0)

    return waits


def test_a_call_that_waits_for_the_card_is_told_and_not_tried_again():
    card = FakeCard()
    clock, waits = card.clock(), card_waits(card)
    clock.milliseconds(waits, 3)
    assert clock.last.ahead is False
    assert len(card.spun) == 6
    clock.milliseconds(waits, 3)
    assert len(card.spun) == 9
    assert card.spun[-1] == cuda_clock.LEAST_CYCLES


def test_a_call_that_the_host_was_late_for_does_not_count():
    card = FakeCard()
    delays = iter([0.1, 9.0, 0.1, 9.0, 9.0])
    clock = card.clock()
    assert clock.milliseconds(lambda: card.call(next(delays), 0.02, 2), 5) == pytest.approx(0.02)
    assert clock.last.ahead


def test_the_clock_is_read_off_the_backlog():
    card = FakeCard()
    clock = card.clock()
    for megahertz in (1980, 1410):
        card.megahertz = megahertz
        clock.milliseconds(functools.partial(card.call, 0.1, 0.02), 5)
        assert clock.last.megahertz == pytest.approx(megahertz)


def test_the_cache_is_written_unless_it_is_not_to_be():
    assert FakeCard().clock().scratch.numel() == 2 * 1024
    assert FakeCard().clock(flush=False).scratch is None


def test_samples_come_with_what_the_clock_knows():
    card = FakeCard()
    more: dict[str, list[Sample]] = {}
    runs = {name: functools.partial(card.call, 0.2, ms) for name, ms in (("a", 0.01), ("b", 0.03))}
    samples = interleaved(runs, rounds=3, clock=card.clock(), more=more)
    assert {name: [one.device_ms for one in found] for name, found in more.items()} == samples
    more = {}
    interleaved({"host": lambda: None}, rounds=1, clock=HostClock(1e-6), more=more)
    assert more == {}


def test_a_row_gets_the_figures_of_all_its_visits(monkeypatch):
    """The card waits for the host in the second of three; the clock moves before it."""
    card = FakeCard()
    monkeypatch.setattr(run, "clock_of", lambda device: card.clock())
    monkeypatch.setattr(run, "call", lambda *_: functools.partial(card.call, 0.1, 1.0))
    monkeypatch.setattr(run, "anchor", lambda *_: functools.partial(card.call, 0.1, 2.0))
    monkeypatch.setattr(run, "peak_megabytes", lambda *_: 1.0)
    subject = SimpleNamespace(device=torch.device("cuda"), op=SimpleNamespace(anchor="product"))
    found = {"backend": "cuda", "verified": True}
    group = run.Group(subject, "forward", [found])
    group.measure(None, 60.0, 2)
    assert (found["samples_ms"], found["ahead"]) == ([pytest.approx([1.0, 1.0])], True)
    card.megahertz = 1500.0
    monkeypatch.setattr(run, "call", lambda *_: card_waits(card))
    group.measure(None, 60.0, 2)
    assert found["megahertz"] == [[2000.0] * 2, [1500.0] * 2]
    assert found["host_ms"][0] == pytest.approx([0.1, 0.1]) and len(found["host_ms"][1]) == 2
    assert found["ahead"] is False
    monkeypatch.setattr(run, "call", lambda *_: functools.partial(card.call, 0.1, 1.0))
    group.measure(None, 60.0, 2)
    assert found["ahead"] is False and len(found["samples_ms"]) == 3


# ---- Clocks that move


def test_a_clock_has_moved_by_its_range_without_the_tenths_at_its_ends():
    assert moved([]) == moved([1980.0]) == 1.0
    assert moved([1980.0] * 20) == 1.0
    assert moved([1980.0] * 10 + [1500.0] * 10) == pytest.approx(1.32)
    assert moved([1980.0] * 30 + [600.0]) == 1.0


@pytest.mark.parametrize(
    "factor, clock, verdict",
    [
        (1.3, 1.0, "slower"),
        (1.3, 1.05, "slower"),
        (1.3, 1.2, "ambiguous"),
        (0.5, 1.2, "faster"),
        (1.0, 1.05, "no difference"),
        (1.0, 1.2, "ambiguous"),
    ],
)
def test_a_verdict_stands_if_the_clock_cannot_have_made_it(factor, clock, verdict):
    assert Factor(factor, factor - 0.01, factor + 0.01).verdict(0.15, clock) == verdict


def on_a_card(megahertz: float, **options) -> dict:
    found = row(**options) | {"device": "cuda"}
    return found | {"host_ms": [[0.2] * 3] * 3, "megahertz": [[megahertz] * 3] * 3, "ahead": True}


def test_files_are_compared_with_their_clocks():
    before = {"rows": [on_a_card(1980)]}
    for megahertz, verdict in ((1980, "slower"), (1500, "ambiguous")):
        after = {"rows": [on_a_card(megahertz, slower=1.3)]}
        (compared,) = compare_records(before, after, smallest=0.15)
        assert compared.verdict == verdict
        assert not compared.is_worse or verdict == "slower"


@pytest.mark.parametrize(
    "clocks, verdict", [([], "slower"), ([1980] * 9, "slower"), ([1980, 1500] * 5, "ambiguous")]
)
def test_builds_are_compared_with_their_clocks(clocks, verdict):
    assert _compared((), None, [[(1.0, 1.3)] * 3] * 3, clocks, 0.15).verdict == verdict


def test_host_time_and_clock_stand_beside_the_time():
    plain = on_a_card(1980, backend="torch", slower=2.0)
    late = on_a_card(1980, backend="triton", slower=1.0) | {"ahead": False}
    throttled = on_a_card(900, backend="cuda", slower=1.5)
    rows = [plain, late, throttled]
    lines = [run.line(one, rows, ()) for one in rows]
    assert [line.split()[-2:] for line in lines] == [["0.200", "1980"], ["!", "1980"], ["0.200", "900"]]
    assert " 2.00x " in lines[1] and " ambiguous " in lines[2]
    assert report.columns(rows)[-2:] == ["host ms", "MHz"]
    assert report.cells(late, rows, ())[-2:] == ["0.200 !", "1980"]
    assert len(report.cells(late, rows, ())) == len(report.columns(rows))
    assert "host ms" not in report.columns([row()])


@pytest.mark.parametrize("field, value", [("megahertz", [[0]]), ("host_ms", 0.2), ("ahead", 1)])
def test_figures_of_cards_keep_to_their_schema(field, value):
    assert schema._about_row(on_a_card(1980)) is None
    assert field in schema._about_row(on_a_card(1980) | {field: value})
    failed = row(reason="wrong") | {field: on_a_card(1980)[field]}
    assert "no figures" in schema._about_row(failed)
