# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest: records the functions that each test reaches, or runs chosen tests in a given order.

MUTATE_RECORD names the file for the record, MUTATE_FOLDER the folder whose functions count, MUTATE_SECONDS the
processor time after which no further test begins. MUTATE_TESTS names a file with the tests to run, MUTATE_RESULT the
file for the running and the failed test. In processes that a test starts, a .pth file calls ``start``.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def _watch() -> None:
    """Collects the calls of this thread and of threads that it starts later."""
    import _mutate_calls

    threading.setprofile(_mutate_calls.watch)
    _mutate_calls.watch()


def _reached() -> list[str]:
    """The functions called since the last query, as ``file:name``."""
    import _mutate_calls

    folder = os.environ["MUTATE_FOLDER"] + os.sep
    codes = ((code.co_filename, getattr(code, "co_qualname", code.co_name)) for code in _mutate_calls.take())
    found = {f"{file[len(folder) :]}:{name}" for file, name in codes if file.startswith(folder)}
    return sorted(name for name in found if not name.startswith(("tests/", "build/")))


def start() -> None:
    """Records the calls of a process that a test has started."""
    if "MUTATE_CHILDREN" in os.environ:
        _watch()
        atexit.register(_leave)


def _leave() -> None:
    sys.setprofile(None)
    path = Path(os.environ["MUTATE_CHILDREN"], f"{os.getpid()}-{time.monotonic_ns()}")
    path.write_text("\n".join(_reached()))


class _Record:
    """Seconds, outcome and reached functions of each test."""

    def __init__(self, path: Path) -> None:
        self.path, self.children = path, path.with_suffix(".children")
        self.children.mkdir(exist_ok=True)
        self.limit = float(os.environ["MUTATE_SECONDS"])
        self.written = time.monotonic()
        self.tests: dict[str, dict[str, Any]] = {}
        self.complete = True

    def pytest_sessionstart(self) -> None:
        os.environ["MUTATE_CHILDREN"] = str(self.children)

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        self.tests[nodeid] = {"seconds": 0.0, "outcome": "passed"}
        _reached()
        _watch()

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed":
            test["outcome"] = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str, location: object) -> None:
        sys.setprofile(None)
        found = set(_reached())
        for child in self.children.iterdir():
            found.update(child.read_text().splitlines())
            child.unlink()
        self.tests[nodeid]["reaches"] = sorted(found)
        if time.monotonic() - self.written > 10:
            self._write(False)

    def pytest_runtest_setup(self, item: Any) -> None:
        if sum(os.times()[:4]) > self.limit:  # of processors, so that a busy machine records the same tests
            self.complete = False
            item.session.shouldstop = f"{self.limit:.0f} seconds are over"

    def pytest_sessionfinish(self) -> None:
        self._write(self.complete)

    def _write(self, complete: bool) -> None:
        """Writes the record; each function's name appears only once."""
        done = {node: test for node, test in self.tests.items() if "reaches" in test}
        names = sorted({name for test in done.values() for name in test["reaches"]})
        numbers = {name: number for number, name in enumerate(names)}
        tests = {
            node: {**test, "reaches": [numbers[name] for name in test["reaches"]]}
            for node, test in done.items()
        }
        folder = os.environ["MUTATE_FOLDER"] + os.sep
        files = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
        imported = sorted(file[len(folder) :] for file in files if file.startswith(folder))
        write_json(
            self.path, {"complete": complete, "functions": names, "imported": imported, "tests": tests}
        )
        self.written = time.monotonic()


class _Choice:
    """Runs the listed tests in their order, or all; writes down the running test and the failed one."""

    def __init__(self, tests: list[str] | None, result: Path) -> None:
        self.order, self.result = {node: at for at, node in enumerate(tests or ())}, result
        self.done, self.all = 0, tests is None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.all:
            return
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        self._tell("runs", nodeid)

    def pytest_runtest_logfinish(self, nodeid: str, location: object) -> None:
        self.done += 1

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._tell("failed", report.nodeid, str(report.longreprtext).strip().splitlines()[-1:])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._tell("failed", report.nodeid, str(report.longreprtext).strip().splitlines()[-1:])

    def _tell(self, what: str, node: str, why: list[str] | None = None) -> None:
        told = {
            "what": what,
            "test": node,
            "since": time.time(),
            "done": self.done,
            "why": " ".join(why or []),
        }
        write_json(self.result, told)


def write_json(path: Path, value: object) -> None:
    """Writes atomically: if the process is killed, the file is complete or unchanged."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def pytest_configure(config: Any) -> None:
    if record := os.environ.get("MUTATE_RECORD"):
        config.pluginmanager.register(_Record(Path(record)))
    if tests := os.environ.get("MUTATE_TESTS"):
        chosen = json.loads(Path(tests).read_text(encoding="utf-8"))
        config.pluginmanager.register(_Choice(chosen, Path(os.environ["MUTATE_RESULT"])))
