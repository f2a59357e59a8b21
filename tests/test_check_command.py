# SPDX-License-Identifier: Apache-2.0
"""`vitkern check`: finds and names a flipped sign in any backward, lists checks that do not run, repeats failures."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

import vitkern
from tests import emulated
from tests.runners import RUNNERS
from vitkern import reference
from vitkern.cases.ops import OPS
from vitkern.check import compare, examine, report, run, sanitize, worker
from vitkern.check.plan import Request, plan
from vitkern.check.routes import Route
from vitkern.cli import main
from vitkern.ops import op as ops

DIFFERENTIABLE = {
    "ms_deform_attn": ["value", "locations", "weights"],
    "ms_deform_attn_fused": ["value", "reference_points", "offsets", "logits"],
    "adapter_bottleneck": ["x", "down_weight", "down_bias", "up_weight", "up_bias", "scale"],
    "token_pool": ["x", "weight"],
    "token_project": ["query", "key", "tokens"],
}
CHEAP = {
    "ms_deform_attn": "odd-channels",
    "ms_deform_attn_fused": "odd-channels",
    "adapter_bottleneck": "gelu",
    "token_pool": "odd-channels",
    "token_project": "odd-channels",
}


def check(*arguments: object) -> int:
    return main(["check", *map(str, arguments)])


@pytest.fixture(autouse=True)
def emulated_kernels(monkeypatch):
    """Lets `vitkern check` find the emulated kernels that the tests have built."""
    if emulated.REASON is None:
        monkeypatch.setenv("VITKERN_EMULATED", emulated.module().__file__)
    yield
    ops.forget_plans()


def wrong_backward(monkeypatch, op: str, backend: str, change) -> None:
    """Changes the list of gradients of a backend's backward."""
    owner = importlib.import_module(f"vitkern.ops.{op.removesuffix('_fused')}")
    owner, plan = getattr(owner, op), getattr(owner, op)._plan

    def wrong(chosen, *inputs):
        right = plan(chosen, *inputs)
        if chosen != backend:
            return right
        return right._replace(backward=lambda *arguments: change(list(right.backward(*arguments))))

    monkeypatch.setattr(owner, "_plan", wrong)
    ops.forget_plans()


def flip(monkeypatch, op: str, backend: str, place: int) -> None:
    """Flips the sign of one gradient of a backend's backward."""

    def change(gradients):
        if gradients[place] is not None:
            gradients[place] = -gradients[place]
        return gradients

    wrong_backward(monkeypatch, op, backend, change)


FLIPS = [
    pytest.param(runner, op, name, id=f"{runner.name}-{op}-{name}", marks=runner.marks)
    for runner in RUNNERS
    if runner.name in ("cpu-baseline", "cuda-emulated", "triton-interpreted")
    for op, names in DIFFERENTIABLE.items()
    for name in names
]


@pytest.mark.parametrize("runner, op, name", FLIPS)
def test_a_flipped_sign_is_named(runner, op, name, monkeypatch, capsys):
    place = DIFFERENTIABLE[op].index(name)
    flip(monkeypatch, op, runner.backend, place)
    arguments = ["--op", op, "--backend", runner.name, "--dtype", "fp32", "--case", CHEAP[op]]
    assert check(*arguments, "--device", "cpu", "--kind", "oracle") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert failed[0].startswith(f"FAILED {op} on {runner.name} in fp32, oracle of case {CHEAP[op]}: ")
    assert f"gradient of {name} is off by" in failed[0]


def test_gradcheck_and_the_oracle_find_the_same(monkeypatch, capsys):
    flip(monkeypatch, "token_pool", "cpu", 1)
    assert check("--op", "token_pool", "--backend", "cpu-baseline", "--case", "tiny") == 1
    assert "gradient of weight is not that of finite differences" in capsys.readouterr().out


def test_a_gradient_that_changes_from_run_to_run_is_found(monkeypatch, capsys):
    factors = iter(range(10**6))

    def restless(gradients):
        x, weight = gradients
        return [x, weight * (1 + next(factors) * torch.finfo(torch.float32).eps)]

    wrong_backward(monkeypatch, "token_pool", "cpu", restless)
    arguments = ["--op", "token_pool", "--backend", "cpu-baseline", "--dtype", "fp32", "--kind", "repeat"]
    assert check(*arguments) == 1
    assert "gradient of weight has other bits the second time" in capsys.readouterr().out


def test_the_printed_command_repeats_the_failure_and_no_other(monkeypatch, capsys, tmp_path):
    flip(monkeypatch, "ms_deform_attn", "cpu", 0)
    arguments = ["--op", "ms_deform_attn", "--backend", "cpu-baseline", "--quick", "--seed", 3]
    report = tmp_path / "junit.xml"
    assert check(*arguments, "--junit", report) == 1
    repeat = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  repeat: "))
    words = shlex.split(repeat.removeprefix("  repeat: "))
    assert words[:2] == ["vitkern", "check"]
    assert main(words[1:]) == 1
    assert re.search("^1 checks in [0-9]+ s, 1 FAILED$", capsys.readouterr().out, re.MULTILINE)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failures = suite.findall("testcase/failure")
    assert int(suite.get("failures")) == len(failures) > 0
    assert any(repeat in failure.text for failure in failures)
    assert int(suite.get("tests")) == len(suite.findall("testcase"))
    assert suite.findall("testcase/skipped")


@pytest.mark.parametrize("route", ["cpu-baseline", "reference"])
def test_the_yardstick_is_plain_torch_in_the_dtype_itself(route):
    """The yardstick is not backend="reference", which sums in float32, as the kernels do."""
    request = Request(["token_pool"], ["odd-channels"], [route], ["bf16"], device="cpu", kinds=["oracle"])
    known = examine._expected_of(*plan(request).tasks)
    plain = reference.token_pool(*known.tensors)
    assert torch.equal(known.plain[0], plain)
    assert not torch.equal(vitkern.token_pool(*known.tensors, backend="reference"), plain)


def test_colours_and_zeros_in_a_message_are_no_part_of_the_xml(monkeypatch, capsys, tmp_path):
    def wrong(*_):
        raise RuntimeError("\x1b[31merror:\x1b[0m compilation \0 failed \ud800")

    monkeypatch.setattr(examine, "compare", wrong)
    arguments = ["--op", "token_pool", "--backend", "cpu-baseline", "--dtype", "fp32", "--kind", "oracle"]
    assert check(*arguments, "--case", "odd-channels", "--junit", tmp_path / "junit.xml") == 1
    (failure,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("failure")
    assert failure.get("message") == "raised RuntimeError: error: compilation \\x00 failed \\ud800"
    assert "error: compilation \\x00 failed" in failure.text


def interrupt(monkeypatch, module, after: int) -> None:
    """Raises KeyboardInterrupt in the check after the first `after` ones."""
    examine, done = module.examine, itertools.count()

    def until(*arguments):
        if next(done) == after:
            raise KeyboardInterrupt
        return examine(*arguments)

    monkeypatch.setattr(module, "examine", until)


def test_an_interrupted_run_tells_what_it_knows(monkeypatch, capsys, tmp_path):
    interrupt(monkeypatch, run, 2)
    arguments = ["--op", "token_pool", "--backend", "cpu-baseline", "--quick"]
    assert check(*arguments, "--junit", tmp_path / "junit.xml") == 130
    said = capsys.readouterr().out
    assert "token_pool            cpu-baseline" in said
    assert "the checks that follow: interrupted" in said
    assert said.splitlines()[-1].startswith("2 checks in")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("skipped")) == ("3", "1")


def test_an_interrupted_run_has_what_its_other_process_did(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wait = worker.Worker.wait

    def interrupted(self):
        wait(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.Worker, "wait", interrupted)
    wanted = ["--op", "token_project", "--backend", "triton-interpreted", "--dtype", "fp32"]
    assert check(*wanted, "--case", "no-batch", "--device", "cpu") == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 checks in")


def test_ctrl_c_before_the_checks_is_one_line(monkeypatch, capsys):
    def interrupted(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "plan", interrupted)
    assert check("--quick") == 130
    assert capsys.readouterr().err == "vitkern check: interrupted\n"


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["--op", "token_pool", "--backend", "cpu-baseline", "--kind", "gradcheck"]
    assert check(*arguments, "--junit", tmp_path / "file" / "junit.xml") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("vitkern check: cannot write ")


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_right_on_the_best_instruction_set(op):
    from vitkern import _C

    best = f"cpu-{_C.supported_cpu_isas()[-1]}"
    assert check("--op", op, "--backend", best, "--quick", "--dtype", "fp32") == 0


@pytest.mark.parametrize("times", [2, 4])
def test_the_unit_of_an_error_is_that_of_plain_torch_whatever_is_allowed(times):
    exact = torch.zeros(1, dtype=torch.float64)
    verdict = compare.judge(torch.tensor([3.0]), torch.tensor([1.0]), exact, times=times)
    assert verdict.ratio == 3
    assert (verdict.complaint is None) == (times == 4)


@pytest.mark.parametrize("options, limit", [([], 2), (["--times", "2.5"], 2.5)])
def test_the_table_says_the_limit(options, limit, capsys):
    wanted = ["--op", "token_pool", "--backend", "cpu-baseline", "--kind", "oracle", "--case", "no-batch"]
    assert check(*wanted, *options) == 0
    assert f"({limit} is the limit)" in capsys.readouterr().out


def test_what_is_not_run_is_said(monkeypatch, capsys):
    monkeypatch.delenv("VITKERN_EMULATED")
    assert check("--list", "--quick", "--device", "cpu", "--op", "token_pool") == 0
    said = capsys.readouterr().out
    assert "cuda-emulated: in a checkout, VITKERN_EMULATED=" in said
    assert "triton-interpreted: 1 checks: the Triton kernels have no float64" in said
    assert "left out by --quick" in said
    commands = [line for line in said.splitlines() if line.startswith("vitkern check --op token_pool ")]
    assert len(commands) == len(set(commands)) > 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "metal"], "unknown backend 'metal': choose from reference, cpu-"),
        (["--op", "conv"], "unknown op 'conv': choose from ms_deform_attn"),
        (["--case", "nothing-*"], r"unknown case 'nothing-\*': choose from "),
        (["--dtype", "int8"], "unknown dtype 'int8': choose from fp32"),
        (["--module", "a:B", "--op", "token_pool"], "--op does not go with --module"),
        (["--kind", "gradcheck", "--dtype", "bf16"], "no check matches the request; --list"),
        (["--times", "0"], "--times must be more than 0, got 0"),
        (["--times", "-1"], "--times must be more than 0, got -1"),
        (["--times", "nan"], "--times must be more than 0, got nan"),
        (["--times", "inf"], "--times must be more than 0, got inf"),
        (["--sanitize", "--list"], "--list does not go with --sanitize"),
    ],
)
def test_what_does_not_exist_is_one_sentence(arguments, message, capsys):
    assert check(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitkern check: ")
    assert message.replace("\\", "") in said
    assert said.count("\n") == 1


def test_the_repeating_command_says_all_that_mattered():
    request = Request(["token_pool"], ["v*"], dtypes=["fp32"], device="cpu", quick=True, seed=3, times=0.5)
    task = plan(replace(request, backends=["reference"], kinds=["oracle"])).tasks[0]
    said = "vitkern check --op token_pool --case vt-3136 --backend reference --dtype fp32 --device cpu"
    assert report.command(task, request) == f"{said} --kind oracle --seed 3 --times 0.5"


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Stands in for compute-sanitizer and a GPU: records the commands to run; racecheck reports a finding."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\ncase $1 in *racecheck) exit 9; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = [Route(f"{name}-gpu", name, "cuda", None) for name in ("cuda", "reference")]
    own.append(Route("triton-gpu", "triton", "cuda", "no triton"))
    monkeypatch.setattr(sanitize, "all_routes", lambda device: own)
    return tmp_path / "ran"


@pytest.mark.skipif(os.name == "nt", reason="stands in for a program with a shell script")
@pytest.mark.parametrize(
    "given, wanted",
    [
        ([], "--backend cuda-gpu --device cuda --quick --kind oracle --kind repeat"),
        (
            ["--case", "vt-*", "--kind", "gradcheck"],
            "--case vt-* --backend cuda-gpu --device cuda --kind gradcheck",
        ),
        (
            ["--device", "cuda", "--backend", "triton"],
            "--backend triton --device cuda --quick --kind oracle --kind repeat",
        ),
        (["--module", "a:B"], "--device cuda --quick --module a:B"),
    ],
)
def test_each_sanitizer_runs_the_small_cases_in_one_process(given, wanted, sanitizer, capsys):
    assert check("--sanitize", *given) == 1
    lines = sanitizer.read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"--tool={tool}" for tool in sanitize.TOOLS]
    assert all(line.endswith(f"-m vitkern check {wanted}") for line in lines)
    assert re.findall("FAILED: .*", capsys.readouterr().out) == ["FAILED: racecheck found errors, see above"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is refused here")
@pytest.mark.parametrize("arguments", [["--backend", "cuda-gpu"], ["--device", "cuda"], ["--sanitize"]])
def test_what_cannot_run_here_is_refused(arguments, capsys):
    assert check(*arguments) == 2
    assert "GPU" in capsys.readouterr().err


def test_interpreted_triton_runs_in_a_process_of_its_own(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wanted = ["--op", "token_project", "--backend", "triton-interpreted", "--dtype", "fp32"]
    assert check(*wanted, "--case", "no-batch", "--device", "cpu") == 0
    assert "1 checks" in capsys.readouterr().out


def test_a_process_that_dies_fails_its_checks(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    request = Request(["token_pool"], ["no-batch"], ["triton-interpreted"], ["fp32"], device="cpu")
    tasks = plan(request).tasks
    with worker.Worker(tasks, request) as other:
        other.process.kill()
        (outcome,) = other.outcomes()
    assert outcome.failures[0].startswith("its process ended with SIGKILL")
