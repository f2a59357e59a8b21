# SPDX-License-Identifier: Apache-2.0
"""Runs and judges one case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tools.fuzzing.call import Actual, actual, expected, function, left_out, routes
from tools.fuzzing.draw import Case, draw
from tools.fuzzing.judge import Wrong, judge, unsure


@dataclass
class Outcome:
    case: Case
    route: str
    found: list[Wrong | str] = field(default_factory=list)
    numbers: tuple[int, int] = (0, 0)  # that may be anything, of how many

    def report(self) -> str:
        case = self.case
        first = f"case {case.number}: {case.op} on {self.route} in {case.dtype}"
        return "\n  ".join([first, *map(str, self.found)])


def try_case(
    number: int, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run
) -> Outcome:
    """Runs a case. `wrap` wraps the public function, for tests of the fuzzer."""
    case = draw(number)
    usable = routes()[case.backend]
    if not usable:
        return Outcome(case, case.backend, [left_out(case.backend)])
    route = usable[case.isa % len(usable)]
    outcome = Outcome(case, route.name)
    known = expected(case)
    outcome.numbers = unsure(case, known)
    run = wrap(function(case))
    with route.active(), np.errstate(all="ignore"):  # Triton's interpreter works with numpy
        first = _attempt(case, run, outcome, known, "")
        if case.twice and first is not None:
            second = _attempt(case, run, outcome, known, "in a second call, ")
            if second is not None and case.backend == "cpu":
                outcome.found += [
                    f"{name} has other bits in a second call"
                    for name in first
                    if not torch.equal(first[name].nan_to_num(7), second[name].nan_to_num(7))
                ]
    if case.places.overwritten():
        outcome.found.append("an input was written to")
    return outcome


def _attempt(
    case: Case, run: Callable[..., Any], outcome: Outcome, known: dict[str, Any], when: str
) -> Actual | None:
    try:
        results = actual(case, run)
    except Exception as error:
        outcome.found.append(f"{when}raised {type(error).__name__}: {error}"[:500])
        return None
    outcome.found += [f"{when}{one}" if when else one for one in judge(case, results, known)]
    return results


def describe(case: Case) -> str:
    """A description of the whole case."""
    levels = f", levels {case.levels} from {case.starts}" if case.levels else ""
    lines = [f"options {case.options}{levels}"]
    lines.append(f"gradients of {', '.join(case.wanted) or 'nothing'}; around the call: {case.mode}")
    facts = ("threads", "deterministic", "guarded", "twice", "residual_is_x")
    lines.append(", ".join(f"{fact} {getattr(case, fact)}" for fact in facts))
    for name, tensor in {**case.tensors, "grad_output": case.grad_output}.items():
        if tensor is not None:
            views = " negated" if tensor.is_neg() else ""
            lines.append(f"{name} {list(tensor.shape)} {tensor.dtype} strides {tensor.stride()}{views}")
    return "\n  ".join(lines)
