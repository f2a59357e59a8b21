# SPDX-License-Identifier: Apache-2.0
"""One of the two processes of `vitkern bench compare --live`: python live_worker.py HARNESS [FOLDER].

It imports vitkern from FOLDER, or from where its interpreter finds it, and the packages that measure from HARNESS, the
package whose command was called, so both builds are measured by the same code. It answers each line of JSON with one
line, and does nothing in between.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

MEASURING = ("bench", "cases", "commands")


class Finder(importlib.abc.MetaPathFinder):
    """An import hook before all others: those of editable installs would find the build of the interpreter."""

    def __init__(self, harness: str, folder: str | None) -> None:
        self.harness = harness
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        package, *inside = name.split(".")
        if package != "vitkern":
            return None
        if inside[:1] and inside[0] in MEASURING:
            path = [str(Path(self.harness, *inside[:-1]))]
        elif self.folder is None:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path or [self.folder])


class Worker:
    """The row that is open now, and its calls."""

    def __init__(self) -> None:
        self.run: Any = None
        self.clock: Any = None

    def hello(self, threads: int) -> dict[str, Any]:
        import torch

        import vitkern
        from vitkern import _C
        from vitkern.bench.environment import environment, in_words

        torch.set_num_threads(threads)
        return {"package": vitkern.__file__, "compiled": _C.__file__, "words": in_words(environment())}

    def open(self, key: list[Any], check: bool) -> dict[str, Any]:
        """The reason why the row cannot be timed, or the number of calls of a sample."""
        from vitkern.bench import run as bench
        from vitkern.bench.measure import clock_of
        from vitkern.bench.plan import one
        from vitkern.commands.errors import CommandError

        self.run = None
        try:
            subject = one(*key)
        except CommandError as error:
            return {"reason": str(error)}
        what, backend = subject.passes[0], subject.backends[0]
        work = subject.op.workload(subject.case, subject.dtype, subject.device.type)
        if check:
            row = bench.checked_row(subject, what, backend, bench.check(subject, work)[backend])
            if not row["verified"]:
                return {"reason": row["reason"]}
        self.run, self.clock = bench.call(work, backend, what), clock_of(subject.device)
        return {"reason": None, "calls": self.clock.calls(self.run)}

    def sample(self, calls: int) -> dict[str, Any]:
        # Warms up until the other process's threads are asleep and the caches hold our data.
        for _ in range(1 + calls // 4):
            self.run()
        taken, more = self.clock.milliseconds(self.run, calls), getattr(self.clock, "last", None)
        return {"milliseconds": taken, "megahertz": more and more.megahertz}


def main() -> None:
    # Ctrl-C is for the parent process; this one ends when its input ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python puts the folder of this file first in sys.path, where `import report` would find our report.py.
    del sys.path[0]
    sys.meta_path.insert(0, Finder(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not get between the answers
    worker = Worker()
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(getattr(worker, question.pop("do"))(**question)), file=answers, flush=True)


if __name__ == "__main__":
    main()
