# SPDX-License-Identifier: Apache-2.0
"""The fuzzer: its oracle agrees with finite differences, the kernels pass, and planted faults are found."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.fuzzing import adapter, attention, call, judge, memory, one, tokens, workers
from tools.fuzzing.__main__ import main
from tools.fuzzing.arithmetic import FLOAT32, FLOAT64, Bounded
from tools.fuzzing.call import routes
from tools.fuzzing.draw import OPS, begin
from tools.fuzzing.one import try_case
from tools.fuzzing.sampling import Level

LEVELS = [Level(3, 4, 2, slice(0, 2)), Level(1, 2, 0, slice(2, 3)), Level(5, 1, 14, slice(3, 3))]
PIXELS = 19
ROOT = Path(__file__).parents[1]
Formula = Callable[..., dict[str, Bounded]]


def _adapter(activation: str, p: float) -> tuple[Formula, dict[str, tuple[int, ...]]]:
    def formula(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        options = dict(activation=activation, dropout_p=p, seed=5, scale_is_exact=True)
        return adapter.expected(FLOAT64, FLOAT64, {**tensors, "residual": None}, grad, **options)

    shapes = dict(x=(4, 3), down_weight=(5, 3), down_bias=(5,), up_weight=(3, 5), up_bias=(3,), scale=())
    return formula, shapes


def _attention(fused: bool, numbers: int, shared: bool) -> tuple[Formula, dict[str, tuple[int, ...]]]:
    formula = attention.expected_fused if fused else attention.expected_plain
    of_places = (2, 3, 2, 3, 2)
    shapes: dict[str, tuple[int, ...]] = dict(value=(2, PIXELS, 2, 3))
    if fused:
        shapes["reference_points"] = (1, 3, 1, numbers) if shared else (2, 3, 3, numbers)
    shapes |= {
        "offsets" if fused else "locations": of_places,
        "logits" if fused else "weights": of_places[:-1],
    }

    def call(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        return formula(FLOAT64, LEVELS, "bilinear", *tensors.values(), grad.reshape(2, 3, 2, 3))

    return call, shapes


def _pool(shared: bool) -> tuple[Formula, dict[str, tuple[int, ...]]]:
    def formula(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        return tokens.expected_pool(FLOAT64, FLOAT64, FLOAT64, *tensors.values(), grad)

    return formula, dict(x=(2, 4, 3), weight=(5, 3) if shared else (2, 5, 3))


def _project() -> tuple[Formula, dict[str, tuple[int, ...]]]:
    def formula(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        return tokens.expected_project(FLOAT64, FLOAT64, *tensors.values(), grad)

    return formula, dict(x=(2, 4, 3), query=(2, 4, 5), key=(2, 3, 5), tokens=(2, 3, 3))


FORMULAS = {
    "adapter-relu": _adapter("relu", 0.0),
    "adapter-gelu": _adapter("gelu", 0.0),
    "adapter-silu": _adapter("silu", 0.3),
    "attention": _attention(False, 2, False),
    "fused-points": _attention(True, 2, False),
    "fused-boxes": _attention(True, 4, False),
    "fused-shared": _attention(True, 4, True),
    "pool-filter": _pool(True),
    "pool-recurrent": _pool(False),
    "project": _project(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_oracle_has_the_gradients_of_finite_differences(name):
    formula, shapes = FORMULAS[name]
    rng = np.random.default_rng(0)
    tensors = {key: rng.uniform(0.1, 0.9, shape) for key, shape in shapes.items()}
    if "x" in tensors:
        tensors["x"] -= 0.5
    size = formula(grad=np.zeros(_output_of(tensors)), **tensors)["output"].value.shape
    grad = rng.standard_normal(size)
    known = formula(grad=grad, **tensors)
    for key, tensor in tensors.items():
        for _ in range(3):
            way = rng.standard_normal(tensor.shape)
            sides = []
            for step in (1e-6, -1e-6):
                moved = formula(grad=grad, **{**tensors, key: tensor + step * way})["output"].value
                sides.append((moved * grad).sum())
            along = (known[key].value * way).sum()
            np.testing.assert_allclose(along, (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-8, err_msg=key)


def _output_of(tensors: dict[str, np.ndarray]) -> tuple[int, ...]:
    if "value" in tensors:
        return (2, 3, 6)
    return (2, tensors["weight"].shape[-2], 3) if "weight" in tensors else tensors["x"].shape


@pytest.mark.parametrize("offset, sides", [(0.0, 2), (0.25, 1)])
def test_a_point_on_an_edge_may_have_either_slope(offset, sides):
    """In a row of three pixels, rounding decides on which side of the middle pixel's centre the point lies."""
    value, slopes = np.array([1.0, 3.0, 11.0]), (2.0, 8.0)
    levels = [Level(1, 3, 0, slice(0, 1))]
    places = np.array([0.5, 0.5]), np.array([offset, 0.0])
    shapes = (1, 3, 1, 1), (1, 1, 1, 2), (1, 1, 1, 1, 2)
    inputs = [each.reshape(shape) for each, shape in zip((value, *places), shapes)]
    one = np.ones((1, 1, 1, 1))
    known = attention.expected_fused(FLOAT32, levels, "bilinear", *inputs, one, one)["offsets"]
    low, high = (known.value + side * known.error for side in (-1, 1))
    assert sum(low.flat[0] <= slope <= high.flat[0] for slope in slopes) == sides
    assert not low.flat[0] <= 20.0 <= high.flat[0]


NAN, INF = float("nan"), float("inf")


def test_relu_of_a_sum_that_overflows_keeps_nan_or_drops_it():
    """The order of the sum decides between inf, -inf and NaN, so relu's slope, which meets a NaN, may be 1 or 0."""
    tensors = dict(x=[[2e30, 1e30]], down_weight=[[1e30, -1e30]], up_weight=[[NAN], [1.0]])
    arrays = {name: np.array(tensor) for name, tensor in tensors.items()}
    arrays |= dict(down_bias=None, up_bias=None, residual=None, scale=np.array(1.0))
    options = dict(activation="relu", dropout_p=0.0, seed=None, scale_is_exact=True)
    with np.errstate(all="ignore"):
        known = adapter.expected(FLOAT32, FLOAT32, arrays, np.ones((1, 2)), **options)
    assert np.isinf(known["x"].error).all()
    assert (known["up_bias"].value == 1).all() and np.isfinite(known["up_bias"].error).all()


@pytest.mark.parametrize("weight, sure", [(1e20, False), (1e19, True)])
def test_a_product_may_overflow_before_it_meets_a_share(weight, sure):
    """A point between four pixels, whose shares are 1/4: its weight times grad_output, 1e19, comes first or last."""
    levels = [Level(2, 2, 0, slice(0, 1))]
    inputs = np.ones((1, 4, 1, 1)), np.full((1, 1, 1, 1, 2), 0.5), np.full((1, 1, 1, 1), weight)
    with np.errstate(all="ignore"):
        known = attention.expected_plain(FLOAT32, levels, "bilinear", *inputs, np.full((1, 1, 1, 1), 1e19))
    np.testing.assert_allclose(known["value"].value, weight * 1e19 / 4)
    assert (np.isfinite(known["value"].error) == sure).all()


@pytest.mark.parametrize(
    "dtype, value, error, right, wrong",
    [
        (torch.float32, 1.0, 0.0, [1.0], [1 + 2.0**-23, NAN, INF]),
        (torch.float32, 1.0, 2.0**-22, [1 + 2.0**-23, 1 - 2.0**-24], [1 + 2.0**-21, 0.0]),
        (torch.bfloat16, 1 + 2.0**-9, 0.0, [1.0], [1 + 2.0**-7]),  # rounded to the nearest
        (torch.bfloat16, 1 + 2.0**-8, 2.0**-20, [1.0, 1 + 2.0**-7], [1 + 2.0**-6]),
        (torch.float16, 7e4, 0.0, [INF], [65504.0, NAN, -INF]),
        (torch.float16, 65519.0, 2.0, [65504.0, INF], [65472.0, NAN]),
        (torch.float32, NAN, 0.0, [NAN], [0.0, INF]),
        (torch.float32, -INF, 0.0, [-INF], [NAN, INF, -3e38]),
        (torch.float32, 1.0, INF, [NAN, INF, 0.0], []),
    ],
)
def test_a_number_is_right_within_its_bound_and_the_rounding_of_its_type(dtype, value, error, right, wrong):
    known = Bounded(np.array([value]), np.array([error]))
    for got in right:
        assert judge.compare("output", torch.tensor([got], dtype=dtype), known, dtype) == [], got
    for got in wrong:
        assert judge.compare("output", torch.tensor([got], dtype=dtype), known, dtype) != [], got


# How many cases of each backend: 200 in all.
FIXED = {"cpu": 120, "reference": 45, "cuda": 29, "triton": 6}


# Found in hours of fuzzing. The kernels are right: the order of products, which overflow, or a chip's rounding decides.
FOUND = (208344, 1001261, 1053293, 1056035, 1058901, 1111112, 1191387, 1196501, 1209043)


@pytest.mark.parametrize("number", FOUND)
def test_a_case_that_was_called_wrong_is_right(number):
    if not routes()[begin(number)[0].backend]:
        pytest.skip("its backend cannot run here")
    outcome = try_case(number)
    assert not outcome.found, outcome.report()


def numbers_of(*, op: str | None = None, backend: str, dtype: str | None = None) -> Iterator[int]:
    for number in itertools.count():
        case, _ = begin(number)
        if case.backend == backend and op in (None, case.op) and dtype in (None, case.dtype):
            yield number


@pytest.mark.parametrize("backend", FIXED)
def test_fixed_cases_are_right(backend):
    if not routes()[backend]:
        pytest.skip(f"{backend} cannot run here")
    outcomes = [try_case(number) for number in itertools.islice(numbers_of(backend=backend), FIXED[backend])]
    assert [outcome.report() for outcome in outcomes if outcome.found] == []
    anything, numbers = (sum(outcome.numbers[at] for outcome in outcomes) for at in (0, 1))
    assert anything < 0.05 * numbers


Output = Callable[[Tensor], Tensor]


def changes(change: Output):
    """Wraps a function: changes its output, and thereby its gradients."""

    def wrap(run):
        def wrapped(**tensors):
            output = run(**tensors)
            return output if isinstance(output, tuple) else change(output)

        return wrapped

    return wrap


def takes(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
    return lambda run: lambda **tensors: run(**change(tensors))


def _first_changed(tensors: dict[str, Tensor], change: Output) -> dict[str, Tensor]:
    name = next(iter(tensors))
    return {**tensors, name: change(tensors[name])}


def _write(tensor: Tensor) -> Tensor:
    with contextlib.suppress(IndexError, RuntimeError):  # empty, or an expanded one, which refuses
        tensor.detach().select(-1, 0).add_(1)
    return tensor


FAULTS = {
    "a tail that is missing": changes(lambda out: torch.cat([out[..., :-1], 0 * out[..., -1:]], -1)),
    "a bound that is off by one": changes(lambda out: out.roll(1, -1)),
    "strides that are exchanged": takes(lambda t: _first_changed(t, lambda x: x.mT.reshape(x.shape))),
    "a gradient that is forgotten": takes(lambda t: _first_changed(t, lambda x: x.detach())),
    "a gradient of one": takes(lambda t: _first_changed(t, lambda x: x + (x - x.detach()) * 1e-3)),
    "sums of low precision": changes(lambda out: out * (1 + 1e-4)),
    "an input that is written to": takes(lambda t: _first_changed(t, _write)),
    "another type": changes(lambda out: out.double()),
    "another shape": changes(lambda out: out[None]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", OPS)
def test_what_is_planted_is_found(op, fault):
    cases = itertools.islice(numbers_of(op=op, backend="cpu", dtype="float32"), 25)
    assert any(try_case(number, FAULTS[fault]).found for number in cases)


def test_a_case_says_what_differs_and_where(monkeypatch, capsys):
    planted = FAULTS["a tail that is missing"]
    numbers = numbers_of(op="token_project", backend="cpu", dtype="float32")
    number = next(number for number in numbers if try_case(number, planted).found)
    assert main(["--case", str(number)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "right"
    monkeypatch.setattr(one, "function", lambda case: planted(call.function(case)))
    assert main(["--case", str(number)]) == 1
    said = capsys.readouterr().out
    assert f"case {number}: token_project on cpu-" in said
    assert re.search(r"output\[[\d, ]+\]: got -?0\.0, expected -?[\d.e-]+ within [\d.e-]+", said)
    assert said.splitlines()[-1] == "wrong"


def test_the_table_counts_cases_by_op_backend_and_dtype(capsys):
    assert main(["--cases", "60", "--workers", "0", "--backend", "cpu", "--op", "token_pool"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", "backend", "float32", "float64", "float16", "bfloat16", "all", "wrong"]
    row = next(line.split() for line in lines if line.startswith("token_pool") and " cpu " in line)
    expected = [begin(number)[0] for number in range(60)]
    assert int(row[-2]) == sum((case.op, case.backend) == ("token_pool", "cpu") for case in expected)
    assert int(row[-1]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a forked worker has what this test has patched")
def test_a_crash_is_told_and_the_run_goes_on(monkeypatch, capsys):
    first, crashing, last = itertools.islice(numbers_of(backend="cpu"), 3)

    def crash_at(number: int) -> one.Outcome:
        if number == crashing:
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return one.Outcome(begin(number)[0], "cpu")

    monkeypatch.setattr(workers, "_CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(one, "try_case", crash_at)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)  # pytest has taken the file that it writes to
    arguments = ["--seed", str(first), "--cases", str(last + 1 - first), "--workers", "1", "--backend", "cpu"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert f"case {crashing}: ended its process with status -{int(signal.SIGSEGV)}" in said
    assert "3 cases in" in said
    assert "1 wrong" in said


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_command_that_is_killed():
    code = """if True:
        import time
        from tools.fuzzing.workers import Numbers, Wanted, Worker
        worker = Worker(Numbers(0), Wanted("token_pool", ("cpu",)))
        print(worker.process.pid, flush=True)
        time.sleep(60)
    """
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    state = Path(f"/proc/{int(command.stdout.readline())}/stat")
    assert state.exists()
    command.kill()
    command.wait()
    for _ in range(300):
        if not state.exists() or state.read_text().split(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker goes on")


@pytest.mark.skipif(sys.platform != "linux", reason="what a forked process reads")
@pytest.mark.parametrize("at_end", [False, True])
def test_tensors_lie_against_pages_that_end_the_process(at_end):
    every = (memory.Placed(np.random.default_rng(seed)).storage(8, torch.float32) for seed in range(40))
    tensor = next(t for t in every if at_end == ((t.data_ptr() + 32) % memory.PAGE == 0))
    for beyond in (False, True):
        at = (8 if at_end else -1) if beyond else (7 if at_end else 0)

        def read(address: int = tensor.data_ptr() + 4 * at) -> None:
            faulthandler.disable()
            print(ctypes.c_float.from_address(address).value)

        process = multiprocessing.get_context("fork").Process(target=read)
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGSEGV if beyond else 0)
