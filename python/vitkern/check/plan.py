# SPDX-License-Identifier: Apache-2.0
"""From what the user asks for to the checks that run, and to what does not run and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vitkern.check.compare import TIMES
from vitkern.check.routes import Route, all_routes
from vitkern.check.settings import OPS, Op
from vitkern.commands.choices import DTYPES, Filters, cases_exist, chosen, matches
from vitkern.commands.errors import CommandError

# Against float64; finite differences; twice the same bits.
KINDS = ("oracle", "gradcheck", "repeat")
TINY = "tiny"  # the case of finite differences


@dataclass(frozen=True)
class Request(Filters):
    """Backends may be names of routes too."""

    kinds: Sequence[str] = ()
    seed: int = 0
    times: float = TIMES
    module: str | None = None  # somebody's own implementation in the place of the kernels


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


@dataclass(frozen=True)
class Plan:
    tasks: list[Task]
    left_out: list[tuple[str, str]]  # what, and why


def plan(request: Request) -> Plan:
    ops = [OPS[name] for name in chosen("op", request.ops, tuple(OPS)) or OPS]
    kinds = chosen("kind", request.kinds, KINDS) or KINDS
    chosen("dtype", request.dtypes, tuple(DTYPES))
    cases_exist(request.cases, (name for op in ops for name in (*op.settings, TINY)))
    routes, left_out = _routes(request)
    tasks: list[Task] = []
    skipped: Counter[tuple[str, str]] = Counter()
    for op in ops:
        for case, dtype, kind in _rows(op, request, kinds):
            for route in routes:
                reason = route.lacks(DTYPES[dtype]) or _passed_over(op, case, route, request)
                if reason is None:
                    tasks.append(Task(op.name, case, dtype, kind, route, request.seed))
                else:
                    skipped[route.name, reason] += 1
    left_out += [(f"{name}: {number} checks", reason) for (name, reason), number in sorted(skipped.items())]
    return Plan(tasks, left_out)


def _routes(request: Request) -> tuple[list[Route], list[tuple[str, str]]]:
    there = all_routes(request.device)
    for asked in request.backends:
        found = [route for route in there if _is(route, asked)]
        if not found:
            names = ", ".join(route.name for route in there)
            raise CommandError(f"no backend is called {asked}; there are {names}")
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
    """Case, dtype and kind of all checks of an op."""
    dtypes = request.dtypes or (("fp32", "bf16") if request.quick else tuple(DTYPES))
    names = [name for name in op.settings if not request.cases or matches(name, request.cases)]
    tiny = not request.cases or matches(TINY, request.cases)
    if "oracle" in kinds:
        yield from ((name, dtype, "oracle") for name in names for dtype in dtypes)
    if "gradcheck" in kinds and "fp64" in (request.dtypes or ("fp64",)) and tiny:
        yield TINY, "fp64", "gradcheck"
    if "repeat" in kinds and op.quick[0] in names:
        yield from ((op.quick[0], dtype, "repeat") for dtype in dtypes)


def _passed_over(op: Op, case: str, route: Route, request: Request) -> str | None:
    """Why a case is not worth its time on a route; one that the user names always is."""
    setting = op.settings.get(case)
    if setting is None or request.cases or case in op.quick:
        return None
    if request.quick and route.slow:
        return "left out by --quick"
    if (request.quick or route.slow) and setting.same_as is not None:
        return "they take the same way through the kernels as other cases"
    return None
