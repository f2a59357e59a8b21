# SPDX-License-Identifier: Apache-2.0
"""One check: an op on a case in a dtype by a route, compared with float64, finite differences or itself."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from vitkern.cases import Function, results
from vitkern.cases.ops import OPS
from vitkern.cases.record import Op, Problem, Setting
from vitkern.check.compare import TIMES, judge
from vitkern.check.plan import Task
from vitkern.commands.choices import DTYPES
from vitkern.commands.errors import CommandError
from vitkern.ops.plain import in_its_own_dtype

REPEATS = 3


@dataclass
class Outcome:
    task: Task
    seconds: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)  # by result, in units of plain torch's own error
    failures: list[str] = field(default_factory=list)


class ResultError(Exception):
    """There is nothing to compare; the message is the failure."""


@dataclass(frozen=True)
class Expected:
    """The formula in float64, and plain torch in the dtype of the check, on the same inputs."""

    problem: Problem
    setting: Setting
    tensors: tuple[Tensor, ...]
    grad_output: Tensor
    exact: list[Tensor]
    plain: list[Tensor]

    @classmethod
    def of(
        cls,
        problem: Problem,
        setting: Setting,
        dtype: torch.dtype,
        seed: int,
        *,
        formula: Function,
        plain: Function,
    ) -> Expected:
        tensors = setting.tensors(problem, dtype)
        wide = tuple(tensor.double() for tensor in tensors)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(formula(*wide).shape, generator=generator, dtype=torch.float64)
        grad_output = setting.gradient(drawn.to(tensors[0].device, dtype))
        exact = results(formula, wide, grad_output.double())
        return cls(problem, setting, tensors, grad_output, exact, results(plain, tensors, grad_output))

    @classmethod
    def by_reference(
        cls, op: Op, setting: Setting, dtype: torch.dtype, seed: int, device: str, **options: bool
    ) -> Expected:
        problem = op.problem(setting, device=device, seed=seed, tiny=options.get("tiny", False))
        plain = in_its_own_dtype(functools.partial(problem.call, backend="reference"))
        formula = problem.formula if options.get("by_other") else plain
        return cls.of(problem, setting, dtype, seed, formula=formula, plain=plain)

    def results(self, function: Function) -> list[Tensor]:
        return results(function, self.tensors, self.grad_output)

    @property
    def names(self) -> list[str]:
        return ["output", *(f"gradient of {name}" for name in self.problem.inputs)]


def examine(task: Task, times: float = TIMES) -> Outcome:
    outcome = Outcome(task)
    kinds = {"oracle": _oracle, "gradcheck": _gradcheck, "repeat": _repeat, "subset": _subset}
    with timed(outcome), task.route.active(), _threads(task):
        kinds[task.kind](task, outcome, times)
    return outcome


@contextlib.contextmanager
def timed(outcome: Outcome) -> Iterator[None]:
    """Times a check; an exception in it is a failure of the kernels."""
    started = time.perf_counter()
    try:
        yield
    except (CommandError, KeyboardInterrupt):
        raise
    except ResultError as error:
        outcome.failures.append(str(error))
    except BaseException as error:
        outcome.failures.append(f"raised {type(error).__name__}: {error}".splitlines()[0][:300])
    outcome.seconds = time.perf_counter() - started


@functools.lru_cache(maxsize=12)  # dtypes, on routes that take all, little or other functions
def _expected(op: str, case: str, dtype: str, seed: int, device: str, tiny: bool, by_other: bool) -> Expected:
    """The expected results, which all routes of a device share."""
    setting = OPS[op].settings[case]
    return Expected.by_reference(OPS[op], setting, DTYPES[dtype], seed, device, tiny=tiny, by_other=by_other)


def _expected_of(task: Task) -> Expected:
    route = task.route
    # The reference is compared with other functions of torch if these compute the same.
    by_other = route.backend == "reference" and _others_agree(task.setting)
    return _expected(task.op, task.case, task.dtype, task.seed, route.device, route.tiny, by_other)


def _others_agree(setting: Setting) -> bool:
    return setting.ordinary and setting.options.get("method") != "nearest"


def _ours(task: Task, problem: Problem) -> Function:
    return functools.partial(problem.call, backend=task.route.backend)


def _oracle(task: Task, outcome: Outcome, times: float) -> None:
    known = _expected_of(task)
    compare(known, known.results(_ours(task, known.problem)), outcome, times)


def compare(known: Expected, actual: list[Tensor], outcome: Outcome, times: float, where: str = "") -> None:
    """Records in the outcome how far the results are off, and which exceed the limit."""
    for name, a, p, e in zip(known.names, actual, known.plain, known.exact):
        terms = known.problem.sums.get(name)
        extra_tolerance = (
            0.0 if terms is None else terms(known.exact[0]).item() * torch.finfo(torch.float32).eps
        )
        verdict = judge(
            a,
            p,
            e,
            times=times,
            tolerance_factor=known.setting.tolerance_factor,
            extra_tolerance=extra_tolerance,
            gradient=name != "output",
        )
        outcome.ratios[name] = max(verdict.ratio, outcome.ratios.get(name, 0.0))
        if verdict.complaint:
            outcome.failures.append(f"{name} {verdict.complaint}{where}")


def _gradcheck(task: Task, outcome: Outcome, times: float) -> None:
    problem = OPS[task.op].problem(task.setting, device=task.route.device, seed=task.seed)
    leaves = tuple(tensor.requires_grad_() for tensor in problem.inputs.values())
    names = list(problem.inputs)
    with deterministic(task.route.slow):
        try:
            gradcheck(_ours(task, problem), leaves, fast_mode=task.route.slow)
        except GradcheckError as error:
            found = re.search(r"with respect to input (\d+)", str(error))
            which = f"gradient of {names[int(found[1])]}" if found else "the gradient"
            first = str(error).strip().splitlines()[0]
            outcome.failures.append(f"{which} is not that of finite differences: {first}")


def _repeat(task: Task, outcome: Outcome, times: float) -> None:
    """Compares repeated calls: kernels are bitwise reproducible in torch's deterministic mode, which also fills new
    memory with NaN, and CPU kernels always.
    """
    known = _expected_of(task)
    modes = (True, False) if task.route.backend in ("cpu", "reference") else (True,)
    for mode in modes if task.route.device == "cpu" else (True,):
        with deterministic(mode):
            ours = _ours(task, known.problem)
            runs = [known.results(ours) for _ in range(2 if task.route.slow else REPEATS)]
        where = "in deterministic mode" if mode else "without deterministic mode"
        compare(known, runs[0], outcome, times, f" {where}")
        for name, *same in zip(known.names, *runs):
            if not all(tensor.isfinite().all() for tensor in same):
                outcome.failures.append(f"{name} has elements {where} that are never written")
            elif not all(torch.equal(same[0], other) for other in same[1:]):
                outcome.failures.append(f"{name} has other bits the second time {where}")


def _subset(task: Task, outcome: Outcome, times: float) -> None:
    """Compares gradients one by one, and all but one, with those of a call where all are needed."""
    known = _expected_of(task)
    ours, count = _ours(task, known.problem), len(known.tensors)
    _, *together = known.results(ours)
    alone = [{place} for place in range(count)]
    for wanted in [*alone, *({*range(count)} - one for one in alone if count > 2)]:
        leaves = [
            tensor.detach().requires_grad_(place in wanted) for place, tensor in enumerate(known.tensors)
        ]
        ours(*leaves).backward(known.grad_output)
        for place, (name, leaf) in enumerate(zip(known.problem.inputs, leaves)):
            among = f"gradient of {name}, asked for with {len(wanted) - 1} others,"
            if place not in wanted:
                continue
            if leaf.grad is None:
                outcome.failures.append(f"{among} is not there")
            elif not torch.allclose(leaf.grad, together[place], rtol=1e-5, atol=1e-5, equal_nan=True):
                outcome.failures.append(f"{among} is another than with all")


@contextlib.contextmanager
def _threads(task: Task) -> Iterator[None]:
    """Keeps torch's threads for the CPU kernels only: small calls of torch would wait for each other."""
    before = torch.get_num_threads()
    if task.route.backend != "cpu" or task.kind == "gradcheck":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic(mode: bool) -> Iterator[None]:
    """Turns torch's deterministic mode on or off inside a ``with`` block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
