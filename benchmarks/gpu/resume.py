# SPDX-License-Identifier: Apache-2.0
"""pytest -p benchmarks.gpu.resume --outcomes FILE --until TIME: continues with the tests that have no outcome yet.

FILE has a line of JSON for each run of a test; the last line of a test counts. Tests that passed or were skipped do
not run again; tests that failed, or ended the process, come last. An error of the card makes all later tests of a
process fail, so it ends the run; the next run has a new process.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

_BROKEN = ("CUDA error", "CUDA driver error", "AcceleratorError", "an illegal memory access")


def breaks_the_card(text: str) -> bool:
    """Whether an error, by its text, makes all later work of the process fail."""
    return any(sign in text for sign in _BROKEN)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resume")
    group.addoption("--outcomes", type=Path, required=True, help="file of outcomes, read and continued")
    group.addoption("--until", type=float, required=True, help="seconds of the epoch when no more is begun")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(Resume(config.option.outcomes, config.option.until))


def read(path: Path) -> dict[str, str]:
    """The last outcome of each test by its id."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["test"]: line["outcome"] for line in map(json.loads, lines) if "test" in line}


def collected(path: Path) -> int:
    """The number of tests in the last run."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line["collected"] for line in map(json.loads, reversed(lines)) if "collected" in line), 0)


class Resume:
    def __init__(self, path: Path, until: float) -> None:
        self.path, self.until = path, until

    @pytest.hookimpl(trylast=True)  # -m and -k have had their say
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._write(collected=len(items))
        before = read(self.path)
        over = [item for item in items if before.get(item.nodeid) in ("passed", "skipped")]
        config.hook.pytest_deselected(items=over)
        open_ones = [item for item in items if item not in over]
        items[:] = sorted(open_ones, key=lambda item: before.get(item.nodeid) == "failed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # The last line counts: a test that passed and could not be cleaned up after has failed.
        if report.failed:
            self._write(test=report.nodeid, outcome="failed")
        elif report.skipped:
            self._write(test=report.nodeid, outcome="skipped")
        elif report.when == "call":
            self._write(test=report.nodeid, outcome="passed")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> object:
        report = yield
        if report.failed and breaks_the_card(report.longreprtext):
            item.session.shouldstop = f"the card is in an undefined state after {item.nodeid}"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        self._write(test=item.nodeid, outcome="failed")  # that is what stands there if the process ends in it
        done = yield
        if time.time() > self.until:
            item.session.shouldstop = item.session.shouldstop or "the time is over"
        return done

    def _write(self, **line: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file, flush=True)
