# SPDX-License-Identifier: Apache-2.0
"""The checks of a request that run, and those that do not run and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vitkern.cases.ops import OPS
from vitkern.cases.record import Op, Setting
from vitkern.check.compare import TIMES
from vitkern.check.routes import Route, all_routes
from vitkern.commands.choices import DTYPES, Filters, cases_exist, chosen, matches
from vitkern.commands.errors import CommandError

# Against float64; finite differences; the same bits at each call; each gradient alone, and all but each.
KINDS = ("oracle", "gradcheck", "repeat", "subset")


@dataclass(frozen=True)
class Request(Filters):
    """The requested checks; backends may also be names of routes."""

    kinds: Sequence[str] = ()
    seed: int = 0
    times: float = TIMES
    module: str | None = None  # a user's own implementation instead of the kernels


@dataclass(frozen=True)
class Task:
    op: str
    case: str
    dtype: str  # a key of DTYPES
    kind: str
    route: Route
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.route.name, self.dtype, self.kind, self.case

    @property
    def setting(self) -> Setting:
        op = OPS[self.op]
        return (op.tiny if self.kind == "gradcheck" else op.settings)[self.case]


@dataclass(frozen=True)
class Plan:
    tasks: list[Task]
    left_out: list[tuple[str, str]]  # a description, and the reason


def plan(request: Request, routes: Sequence[Route] | None = None) -> Plan:
    """The plan for all routes on this machine, or for these."""
    ops = [OPS[name] for name in chosen("op", request.ops, tuple(OPS)) or OPS]
    kinds = chosen("kind", request.kinds, KINDS) or KINDS
    chosen("dtype", request.dtypes, tuple(DTYPES))
    cases_exist(request.cases, (name for op in ops for name in (*op.settings, *op.tiny)))
    chosen_routes, left_out = _routes(request, routes)
    tasks: list[Task] = []
    skipped: Counter[tuple[str, str]] = Counter()
    for op in ops:
        for case, dtype, kind in _rows(op, request, kinds):
            for route in chosen_routes:
                reason = route.lacks(DTYPES[dtype]) or _passed_over(op, case, dtype, kind, route, request)
                if reason is None:
                    tasks.append(Task(op.name, case, dtype, kind, route, request.seed))
                else:
                    skipped[route.name, reason] += 1
    left_out += [(f"{name}: {number} checks", reason) for (name, reason), number in sorted(skipped.items())]
    return Plan(tasks, left_out)


def _routes(request: Request, routes: Sequence[Route] | None) -> tuple[list[Route], list[tuple[str, str]]]:
    there = all_routes(request.device) if routes is None else routes
    for asked in request.backends:
        found = [route for route in there if _is(route, asked)]
        if not found:
            names = ", ".join(route.name for route in there)
            raise CommandError(f"unknown backend {asked!r}: choose from {names}")
        if all(route.reason for route in found):
            reasons = "; ".join(f"{route.name}: {route.reason}" for route in found)
            raise CommandError(f"backend {asked} cannot run here: {reasons}")
    wanted = [
        route for route in there if not request.backends or any(_is(route, name) for name in request.backends)
    ]
    left_out = [(route.name, route.reason) for route in wanted if route.reason]
    return [route for route in wanted if route.reason is None], left_out


def _is(route: Route, asked: str) -> bool:
    return asked in (route.backend, route.name)


def _rows(op: Op, request: Request, kinds: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The case, dtype and kind of each check of an op."""
    dtypes = request.dtypes or (("fp32", "bf16") if request.quick else tuple(DTYPES))
    names = [name for name in op.settings if not request.cases or matches(name, request.cases)]
    again = [name for name in (op.again[:1] if request.quick else op.again) if name in names]
    if "oracle" in kinds:
        for name in names:
            only = op.settings[name].dtypes or dtypes
            yield from ((name, dtype, "oracle") for dtype in dtypes if dtype in only)
    if "gradcheck" in kinds and "fp64" in (request.dtypes or ("fp64",)):
        tiny = [name for name in op.tiny if not request.cases or matches(name, request.cases)]
        yield from ((name, "fp64", "gradcheck") for name in (tiny[:1] if request.quick else tiny))
    if "repeat" in kinds:
        yield from ((name, dtype, "repeat") for name in again for dtype in dtypes)
    if "subset" in kinds and "fp32" in dtypes:
        yield from ((name, "fp32", "subset") for name in again)


def _passed_over(op: Op, case: str, dtype: str, kind: str, route: Route, request: Request) -> str | None:
    """The reason why a case is not worth its time on a route; cases that the user names always run."""
    if request.cases or kind == "gradcheck":
        return None
    if route.tiny and kind != "oracle" and case != op.again[0]:
        return "an interpreter runs one of them"
    if route.tiny and op.anchor == "gather" and dtype != "fp32" and case not in op.again:
        return "an interpreter runs them in fp32 only"
    if case in op.quick:
        return None
    setting = op.settings[case]
    if request.quick and route.slow:
        return "left out by --quick"
    if (request.quick or route.slow) and setting.same_as is not None:
        return "they take the same way through the kernels as other cases"
    if route.slow and setting.heavy:
        return "too much for kernels that are emulated or interpreted"
    if route.slow and dtype not in ("fp32", "bf16") and case not in op.again and not setting.dtypes:
        return "kernels that are emulated or interpreted run them in fp32 and bf16 only"
    return None
