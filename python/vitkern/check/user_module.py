# SPDX-License-Identifier: Apache-2.0
"""`vitkern check --module`: a user's own multi-scale deformable attention, compared with the same formula."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitkern
from vitkern.cases import Function, MsDeformAttnCase, levels_of
from vitkern.cases.ops import OPS
from vitkern.cases.record import Problem, Setting
from vitkern.check import report
from vitkern.check.examine import Expected, Outcome, ResultError, compare, timed
from vitkern.check.mistakes import mistake_in
from vitkern.check.plan import Request, Task
from vitkern.check.routes import Route
from vitkern.check.worker import Worker
from vitkern.commands import named
from vitkern.commands.choices import DTYPES, cases_exist, chosen, device_of, matches
from vitkern.commands.errors import CommandError, in_one_line
from vitkern.ops.plain import in_its_own_dtype

IM2COL_STEP = 64
FORMS = (
    "an nn.Module with the constructor and the parameters of Deformable-DETR's MSDeformAttn, an autograd.Function "
    "with its six arguments, or a function of value, spatial_shapes, level_start_index, sampling_locations, "
    "attention_weights (and im2col_step)"
)


def check_module(request: Request, *, junit: Path | None) -> int:
    """Returns the exit status: 1 if a check failed."""
    checks = _in_a_process_of_its_own(_tasks(request), request)
    return report.conclude(checks, [], request, junit, limit=_limit(request))


def _limit(request: Request) -> float:
    return 2 * request.times  # another order of operations than plain torch's may round more often


def _tasks(request: Request) -> list[Task]:
    op, name = OPS["ms_deform_attn"], str(request.module)
    cases_exist(request.cases, op.settings)
    dtypes = chosen("dtype", request.dtypes, tuple(DTYPES)) or ("fp32",)
    route = Route(name, name, device_of(request.device), None)
    return [
        Task(op.name, setting.name, dtype, "oracle", route, request.seed)
        for setting in op.settings.values()
        for dtype in dtypes
        if _is_for(setting, dtype, request)
    ]


def _in_a_process_of_its_own(tasks: list[Task], request: Request) -> Iterator[Outcome]:
    """Runs the tasks in another process, which user code may end by a signal or with a status of success."""
    with Worker(tasks, request, __name__) as worker:
        yield from worker.all()


def examined(request: Request) -> Iterator[Outcome]:
    """Each outcome when it is ready, in this process."""
    forms = "package.module:Name or file.py:Name"
    candidate = named.load(str(request.module), option="--module", forms=forms)
    for task in _tasks(request):
        yield _examine(candidate, task, _limit(request))


def _is_for(setting: Setting, dtype: str, request: Request) -> bool:
    """Whether a setting is for every implementation; unusual and empty ones run only on request."""
    if request.cases:
        return matches(setting.name, request.cases)
    # In 16 bits torch's own grid_sample is wrong at 1e30, and finds another pixel on an edge.
    if setting.name in ("far-outside", "on-edges") and DTYPES[dtype].itemsize == 2:
        return False
    return setting.same_as is None and setting.plain


def _examine(candidate: Any, task: Task, times: float) -> Outcome:
    outcome = Outcome(task)
    with timed(outcome):
        is_layer = inspect.isclass(candidate) and issubclass(candidate, nn.Module)
        problem = (_of_layer if is_layer else _of_function)(candidate, task)
        formula = problem.formula
        known = Expected.of(
            problem, task.setting, DTYPES[task.dtype], task.seed, formula=formula, plain=formula
        )
        given = [tensor.clone() for tensor in known.tensors]
        actual = known.results(_judged(problem.call, known.exact[0]))
        if written := [name for name, *pair in zip(problem.inputs, known.tensors, given) if not _same(*pair)]:
            raise ResultError(f"it writes into its inputs: {', '.join(written)}")
        compare(known, actual, outcome, times)
        if not is_layer and outcome.failures and outcome.failures[0].startswith("output"):
            shapes, _ = _levels(task)
            if name := mistake_in(actual[0], known, shapes, times):
                outcome.failures[0] += f"; it is what comes with {name}"
    return outcome


def _same(now: Tensor, before: Tensor) -> bool:
    return torch.allclose(now, before, rtol=0, atol=0, equal_nan=True)


def _judged(call: Function, expected: Tensor) -> Function:
    """The same function, for outputs that have gradients to compare."""

    def run(*tensors: Tensor) -> Tensor:
        output = call(*tensors)
        if not isinstance(output, Tensor):
            raise ResultError(f"it returned a {type(output).__name__}, expected a tensor")
        if output.shape != expected.shape:
            raise ResultError(f"output has shape {list(output.shape)}, expected {list(expected.shape)}")
        if not output.requires_grad:
            raise ResultError("its output has no gradient")
        return output

    return run


def _of_function(candidate: Any, task: Task) -> Problem:
    """The op's problem with the user's function instead of the kernels, compared with the formula."""
    op = OPS[task.op]
    problem = op.problem(task.setting, device=task.route.device, seed=task.seed)
    levels = _levels(task)
    function = adapted(candidate)

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        output = function(value, *levels, locations, weights)
        if not all(map(torch.equal, levels, _levels(task))):
            raise ResultError("it writes into its inputs: spatial_shapes, level_start_index")
        return output

    formula = in_its_own_dtype(functools.partial(problem.call, backend="reference"))
    # Other functions take all tensors in one dtype; float32 coordinates are a contract of vitkern's own kernels.
    return replace(problem, call=ours, by_torch=formula, other=None, wide=())


def _levels(task: Task) -> tuple[Tensor, Tensor]:
    return levels_of(_case(task), task.route.device)


def _case(task: Task) -> MsDeformAttnCase:
    case = task.setting.case
    assert isinstance(case, MsDeformAttnCase)
    return case


def adapted(candidate: Any) -> Function:
    """A function of the op's five tensors from any of the usual forms."""
    function: Function
    if inspect.isclass(candidate) and issubclass(candidate, torch.autograd.Function):
        taken, function = len(inspect.signature(candidate.forward).parameters) - 1, candidate.apply
    elif callable(candidate) and not isinstance(candidate, nn.Module):
        taken, function = _positional(candidate), candidate
    else:
        raise CommandError(f"--module takes {FORMS}, got an instance of {type(candidate).__name__}")
    if taken == 6:
        return lambda *tensors: function(*tensors, IM2COL_STEP)
    if taken == 5:
        return function
    if taken == 4:  # Deformable-DETR's own in plain torch: without level_start_index
        return lambda value, shapes, _, *rest: function(value, shapes, *rest)
    name = getattr(candidate, "__name__", type(candidate).__name__)
    raise CommandError(f"--module takes {FORMS}, got {name} of {taken} arguments")


def _positional(function: Any) -> int:
    """The number of arguments to pass: those without a default, or five if it takes any number."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
    return max(needed, 5) if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters) else needed


def _of_layer(candidate: type[nn.Module], task: Task) -> Problem:
    """The user's layer and our own, in plain torch, with the same random parameters, which are inputs like others."""
    case, device = _case(task), task.route.device
    formula, layer = _layers(candidate, case, device)
    # On edges of cells two roundings have two gradients: reference points are middles of pixels, offsets lead well into
    # a cell, and no offset depends on the query.
    fixed = {"sampling_offsets.weight": formula.sampling_offsets.weight.detach()}
    parameters = {name: parameter for name, parameter in formula.named_parameters() if name not in fixed}
    generator = torch.Generator().manual_seed(task.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    def between(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * drawn).to(device)

    levels = _levels(task)
    sizes = levels[0].flip(-1).clamp(min=1)
    points = between(0.2, 0.8, case.batch, case.query_count, len(case.levels), 2)
    width = formula.value_proj.in_features
    given = {
        "query": normal(case.batch, case.query_count, width),
        "reference_points": ((points * sizes).floor() + 0.5) / sizes,
        "input_flatten": normal(case.batch, case.pixels, width),
    }
    for name, parameter in parameters.items():
        given[name] = normal(*parameter.shape) * parameter.shape[-1] ** -0.5
    offsets = formula.sampling_offsets.bias.detach().double() * 0.37
    given["sampling_offsets.bias"] = offsets.floor() + between(0.3, 0.7, *offsets.shape)

    def runs(module: nn.Module) -> Function:
        def run(query: Tensor, points: Tensor, flat: Tensor, *values: Tensor) -> Tensor:
            own = dict(zip(parameters, values)) | {
                name: tensor.to(query.dtype) for name, tensor in fixed.items()
            }
            return torch.func.functional_call(module, own, (query, points, flat, *levels, None))

        return run

    return Problem(given, call=runs(layer), by_torch=in_its_own_dtype(runs(formula)))


def _layers(
    candidate: type[nn.Module], case: MsDeformAttnCase, device: str
) -> tuple[vitkern.nn.MSDeformAttn, nn.Module]:
    """Our layer on plain torch and the user's, which has to take the same parameters."""
    arguments = (max(case.heads * case.channels, 1), len(case.levels), case.heads, case.points)
    formula = vitkern.nn.MSDeformAttn(*arguments, backend="reference").to(device)
    try:
        layer = candidate(*arguments).to(device)
        layer.load_state_dict(formula.state_dict())
    except (TypeError, RuntimeError) as error:
        why = in_one_line(error)
        raise CommandError(f"--module takes {FORMS}; {candidate.__name__} does not fit: {why}") from error
    return formula, layer
