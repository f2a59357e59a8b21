# SPDX-License-Identifier: Apache-2.0
"""The command ``tools/mutate``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from tools.mutating import table, trial
from tools.mutating.draw import VITKERN, Project, draw
from tools.mutating.mutation import Mutation
from tools.mutating.python_text import same_code
from tools.mutating.reach import write_json
from tools.mutating.record import Record, races_of
from tools.mutating.workplace import DoesNotCompileError, Workplace

RACES = ("tests/test_races.py", "tests/test_schedules.py")  # in a build of their own, so after all others
REVIEWED = Path(__file__).with_name("reviewed.json")


def main(arguments: list[str] | None = None, project: Project = VITKERN, reviewed: Path = REVIEWED) -> int:
    options = _parser().parse_args(arguments)
    earlier = json.loads(options.again.read_text())["rows"] if options.again else []
    if options.again:
        mutations, gone = table.again(project, earlier)
        for row in gone:
            print(f"gone: {table.line_of(row, {})}")
    else:
        mutations = draw(project, options.seed, options.draw)
    if options.list:
        for mutation in mutations:
            print(
                f"{mutation.file}:{mutation.line}, {mutation.rule}: {mutation.before!r} -> {mutation.after!r}"
            )
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the tests that run
    one_pass = Pass(project, mutations, options, table.reasons(reviewed))
    one_pass.run()
    return report(one_pass, earlier)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/mutate",
        description="Plants small faults, one at a time, in a copy of the code under build/mutate, and runs the tests "
        "that reach each until one fails. Killed, it goes on where it was.",
    )
    parser.add_argument("--seed", type=int, default=17, help="of the draw (default: 17)")
    parser.add_argument(
        "--draw", type=int, default=160, help="number of faults that are drawn (default: 160)"
    )
    parser.add_argument("--keep", type=int, default=60, help="number of them that are run (default: 60)")
    parser.add_argument(
        "--again", type=Path, metavar="TABLE", help="the faults of an earlier table, not a new draw"
    )
    parser.add_argument("--list", action="store_true", help="list the faults and run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    parser.add_argument(
        "--hours", type=float, default=3.0, help="no fault is begun after this time (default: 3)"
    )
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="for the tests of a fault (default: 300)"
    )
    parser.add_argument(
        "--record", type=float, default=300.0, help="seconds for the record of a test file (default: 300)"
    )
    parser.add_argument("--processes", type=int, default=2, help="that run tests at once (default: 2)")
    parser.add_argument("--output", type=Path, help="a file for the table, in JSON")
    return parser


class Pass:
    """The mutations, one after another."""

    def __init__(
        self,
        project: Project,
        mutations: list[Mutation],
        options: argparse.Namespace,
        reviewed: dict[str, str],
    ) -> None:
        self.project, self.mutations, self.options, self.reviewed = project, mutations, options, reviewed
        self.place = Workplace(project, options.processes)
        self.end = time.monotonic() + 3600 * options.hours
        path = self.place.root / f"state-{table.identity(mutations)}.json"  # of these mutations of this code
        if options.fresh:
            path.unlink(missing_ok=True)
        self.state = table.State.load(path)

    def run(self) -> None:
        self.place.prepare()
        variables = {"VITKERN_EMULATED": str(self.place.emulated())} if self.project.compiled else {}
        self.record = self._recorded(variables)
        for mutation in self.mutations[len(self.state.rows) :]:
            if self.state.kept() >= self.options.keep or time.monotonic() > self.end:
                break
            row = self._row(mutation, variables)
            self.state.add(row)
            self.write()
            print(f"{self.state.kept()}: {table.line_of(row, {})}", flush=True)

    def write(self) -> None:
        if self.options.output is not None:
            table.write(self.options.output, self.options.seed, self.state.rows, self.reviewed)

    def _recorded(self, variables: dict[str, str]) -> Record:
        folder = self.place.root / "record"
        folder.mkdir(exist_ok=True)
        record = Record(folder)
        missing = [
            (file, record.path(file))
            for file in self.project.tests()
            if not record.has(self.place.tree / file)
        ]
        for _, path in missing:
            path.unlink(missing_ok=True)
        trial.record(
            self.place, missing, self.options.record, lambda text: print(text, flush=True), **variables
        )
        for _, path in missing:  # killed before the first test ended: no later pass tries again
            if not path.exists():
                write_json(path, {"complete": False, "functions": [], "imported": [], "tests": {}})
        return Record(folder)

    def _row(self, mutation: Mutation, variables: dict[str, str]) -> table.Row:
        text = self.place.text(mutation.file)
        began = time.monotonic()
        try:
            if mutation.file.endswith(".py") and same_code(text, mutation.applied(text)):
                return table.row_of(mutation, text, "equivalent", why="the bytecode is the same")
            objects = self.place.plant(mutation)
            if not objects and not mutation.file.endswith(".py"):
                return table.row_of(mutation, text, "equivalent", why="the object code is the same here")
            built = round(time.monotonic() - began, 1)
            tests = self.record.tests(mutation, objects)
            found = trial.run(self.place, tests, self.options.seconds, self.record.seconds, **variables)
            if not found.caught and (words := races_of(objects)):
                races = {"VITKERN_EMULATED_RACES": str(self.place.races()), **variables}
                before, found = (
                    found,
                    trial.run_files(self.place, RACES, words, self.options.seconds, **races),
                )
                found = found._replace(ran=before.ran + found.ran, seconds=before.seconds + found.seconds)
            more = {"by": found.by, "why": found.why, "ran": found.ran, "left": found.left}
            if not found.caught:
                del more["by"]
                more["why"] = "no test reaches it" if not tests else ""
            outcome = "caught" if found.caught else "survived"
            return table.row_of(mutation, text, outcome, **more, built=built, seconds=found.seconds)
        except (DoesNotCompileError, SyntaxError) as error:
            return table.row_of(mutation, text, "does not compile", why=_first_error(str(error)))
        finally:
            if self.place.is_planted():
                self.place.restore()


def _first_error(said: str) -> str:
    return next((line.strip()[-160:] for line in said.splitlines() if "error" in line.lower()), said[-160:])


def report(one_pass: Pass, earlier: list[table.Row]) -> int:
    """Prints and writes the table; 1 if a mutation survives without a reason, or is not caught any more."""
    rows, reviewed = one_pass.state.rows, one_pass.reviewed
    one_pass.write()
    print()
    for row in rows:
        print(table.line_of(row, reviewed))
    for file in one_pass.record.cut:
        print(f"{file} has tests that were not recorded: --record has seconds for more")
    print(table.summary(rows))
    survivors, no_longer = table.unexplained(rows, reviewed), table.lost(rows, earlier)
    print(f"{len(survivors)} survive without a reason")
    for row in no_longer:
        print(f"was caught, survives now: {table.line_of(row, reviewed)}")
    return 1 if survivors or no_longer else 0


if __name__ == "__main__":
    sys.exit(main())
