# SPDX-License-Identifier: Apache-2.0
"""`vitkern check --module`: somebody's own multi-scale deformable attention, held to the same formula."""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitkern
from vitkern.bench.plan import DTYPES
from vitkern.cases import MsDeformAttnCase
from vitkern.check import report
from vitkern.check.compare import judge, results
from vitkern.check.errors import CheckError
from vitkern.check.examine import Outcome, names_of
from vitkern.check.plan import Request, Task, _asked, _cases_exist, _known
from vitkern.check.problems import Function, Problem, _attention_inputs, ms_deform_attn
from vitkern.check.routes import Route
from vitkern.check.settings import OPS, Setting
from vitkern.doctor_model import _of_file

IM2COL_STEP = 64
FORMS = (
    "an nn.Module with the constructor and the parameters of Deformable-DETR's MSDeformAttn, an autograd.Function "
    "with its six arguments, or a function of value, spatial_shapes, level_start_index, sampling_locations, "
    "attention_weights (and im2col_step)"
)


def check_module(name: str, request: Request, *, times: float, junit: Path | None) -> int:
    """Returns what the process is to exit with: 1 if a check failed."""
    theirs = load(name)
    op = OPS["ms_deform_attn"]
    _cases_exist(request.cases, [op])
    dtypes = _known("dtype", request.dtypes, tuple(DTYPES)) or ("fp32",)
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckError(
            "torch finds no usable GPU here (`vitkern doctor` says more), so --device has to be cpu"
        )
    started = time.monotonic()
    outcomes = []
    for setting in _settings(request):
        for dtype in dtypes:
            task = Task(
                "ms_deform_attn", setting.name, dtype, "oracle", Route(name, name, device, None), request.seed
            )
            outcomes.append(_examine(theirs, task, setting, times))
    print(report.HEADING)
    print("\n".join(report.table(outcomes)))
    failed = [outcome for outcome in outcomes if outcome.failures]
    for outcome in failed:
        print("\n".join(report.failure_lines(outcome, request, module=name)))
    if junit is not None:
        report.write_junit(junit, outcomes, [], request, module=name)
    print(f"{len(outcomes)} checks in {time.monotonic() - started:.0f} s, {len(failed)} FAILED")
    return int(bool(failed))


def load(name: str) -> Any:
    source, colon, attribute = name.rpartition(":")
    if not colon:
        raise CheckError(f"--module takes package.module:Name or file.py:Name, got {name!r}")
    try:
        module = _of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (ImportError, OSError) as error:
        raise CheckError(f"--module {name}: {source} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise CheckError(f"--module {name}: {source} has no {attribute!r}")
    return getattr(module, attribute)


def _settings(request: Request) -> Iterator[Setting]:
    """What every implementation is for; what is odd or empty only if it is asked for."""
    for setting in OPS["ms_deform_attn"].settings.values():
        usual = setting.same_as is None and setting.ordinary and not setting.options
        if _asked(setting.name, request.cases) if request.cases else usual:
            yield setting


def _examine(theirs: Any, task: Task, setting: Setting, times: float) -> Outcome:
    outcome = Outcome(task)
    started = time.perf_counter()
    try:
        dtype, device = DTYPES[task.dtype], task.route.device
        if inspect.isclass(theirs) and issubclass(theirs, nn.Module):
            problem, ours, exactly = _of_layer(theirs, setting, task)
        else:
            problem, ours, exactly = _of_function(theirs, setting, task)
        tensors = problem.tensors(dtype)
        wide = tuple(tensor.double() for tensor in tensors)
        generator = torch.Generator().manual_seed(task.seed)
        shape = exactly(*wide).shape
        grad_output = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        exact = results(exactly, wide, grad_output.double())
        plain = results(exactly, tensors, grad_output)
        actual = results(ours, tensors, grad_output)
        for name, a, p, e in zip(names_of(problem), actual, plain, exact):
            # Who computes in another order than plain torch may round more often.
            verdict = judge(a, p, e, times=2 * times, gradient=name != "output")
            outcome.ratios[name] = verdict.ratio
            if verdict.complaint:
                outcome.failures.append(f"{name} {verdict.complaint}")
    except CheckError:
        raise
    except Exception as error:
        outcome.failures.append(f"raised {type(error).__name__}: {error}".splitlines()[0][:300])
    outcome.seconds = time.perf_counter() - started
    return outcome


def _of_function(theirs: Any, setting: Setting, task: Task) -> tuple[Problem, Function, Function]:
    case, device = setting.case, task.route.device
    assert isinstance(case, MsDeformAttnCase)
    problem = ms_deform_attn(case, device, task.seed, **setting.options)
    setting.twist(problem.inputs)
    inputs = _attention_inputs(case, device, task.seed)
    function = adapted(theirs)

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return function(value, inputs.spatial_shapes, inputs.level_start_index, locations, weights)

    return problem, ours, functools.partial(problem.call, backend="reference")


def adapted(theirs: Any) -> Function:
    """A function of the op's five tensors from any form that people have it in."""
    function: Function
    if inspect.isclass(theirs) and issubclass(theirs, torch.autograd.Function):
        taken, function = len(inspect.signature(theirs.forward).parameters) - 1, theirs.apply
    elif callable(theirs):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [p for p in inspect.signature(theirs).parameters.values() if p.kind in kinds]
        taken, function = len([p for p in parameters if p.default is inspect.Parameter.empty]), theirs
    else:
        raise CheckError(f"--module takes {FORMS}, got a {type(theirs).__name__}")
    if taken == 6:
        return lambda *tensors: function(*tensors, IM2COL_STEP)
    if taken == 5:
        return function
    if taken == 4:  # Deformable-DETR's own in plain torch: without level_start_index
        return lambda value, shapes, _, *rest: function(value, shapes, *rest)
    raise CheckError(f"--module takes {FORMS}, got {theirs.__name__} of {taken} arguments")


def _of_layer(theirs: type[nn.Module], setting: Setting, task: Task) -> tuple[Problem, Function, Function]:
    """The layer and our own, in plain torch, with the same random parameters, which are inputs like others."""
    case, device = setting.case, task.route.device
    assert isinstance(case, MsDeformAttnCase)
    inputs = _attention_inputs(case, device, task.seed)
    width = max(case.heads * case.channels, 1)
    arguments = (width, len(case.levels), case.heads, case.points)
    formula = vitkern.nn.MSDeformAttn(*arguments, backend="reference").to(device)
    try:
        layer = theirs(*arguments).to(device)
        layer.load_state_dict(formula.state_dict())
    except (TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckError(f"--module takes {FORMS}; {theirs.__name__} does not fit: {first}") from error
    generator = torch.Generator().manual_seed(task.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    points = torch.rand(
        case.batch, case.query_count, len(case.levels), 2, generator=generator, dtype=torch.float64
    )
    given = {
        "query": normal(case.batch, case.query_count, width),
        "reference_points": (points * 0.6 + 0.2).to(device),
        "input_flatten": normal(case.batch, case.pixels, width),
    }
    # Offsets that follow the query would lie on edges of cells now and then, where two roundings have two gradients.
    names = [name for name, _ in formula.named_parameters() if name != "sampling_offsets.weight"]
    shapes = dict(formula.named_parameters())
    for name in names:
        scale = shapes[name].shape[-1] ** -0.5
        given[name] = normal(*shapes[name].shape) * scale
    given["sampling_offsets.bias"] = formula.sampling_offsets.bias.detach().double() * 0.37

    def runs(module: nn.Module) -> Function:
        def run(query: Tensor, points: Tensor, flat: Tensor, *values: Tensor) -> Tensor:
            parameters = dict(zip(names, values))
            parameters["sampling_offsets.weight"] = shapes["sampling_offsets.weight"].detach().to(query.dtype)
            tables = inputs.spatial_shapes, inputs.level_start_index
            return torch.func.functional_call(module, parameters, (query, points, flat, *tables, None))

        return run

    return Problem(given, lambda: None, lambda: None), runs(layer), runs(formula)  # type: ignore[arg-type,return-value]
