# SPDX-License-Identifier: Apache-2.0
"""`vitkern check --module`: a user's own op in each form that users have it in, right and wrong."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests import layers_of_others
from vitkern.check import user_module
from vitkern.cli import main

THEIRS = """
from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

import vitkern
from vitkern import reference
from vitkern.nn import MSDeformAttn


@dataclass
class Options:  # looks its own module up
    step: int = 64


def five(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    tables = spatial_shapes, level_start_index
    return vitkern.ms_deform_attn(value, *tables, sampling_locations, attention_weights, backend="reference")


def four(value, spatial_shapes, sampling_locations, attention_weights):
    sizes = [tuple(size) for size in spatial_shapes.tolist()]
    return reference.ms_deform_attn_by_grid_sample(value, sizes, sampling_locations, attention_weights)


def in_one_dtype(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    samples = four(value, spatial_shapes, sampling_locations, attention_weights)
    assert samples.dtype == value.dtype == sampling_locations.dtype == attention_weights.dtype
    return samples


def three(value, sampling_locations, attention_weights):
    return value


class Right(torch.autograd.Function):
    signs = (1, 1, 1)

    @classmethod
    def forward(cls, ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return five(value, shapes, starts, locations, weights)

    @classmethod
    def backward(cls, ctx, grad_output):
        value, shapes, starts, *rest = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (value, *rest)]
            output = five(leaves[0], shapes, starts, *leaves[1:])
        grads = torch.autograd.grad(output, leaves, grad_output)
        value, locations, weights = (sign * grad for sign, grad in zip(cls.signs, grads))
        return value, None, None, locations, weights, None


class FlippedLocations(Right):
    signs = (1, -1, 1)


class NoWeights(Right):
    signs = (1, 1, 0)


class Swapped(MSDeformAttn):
    def _offsets_and_logits(self, query):
        offsets, logits = super()._offsets_and_logits(query)
        return offsets.flip(-1), logits


class OtherLayer(nn.Module):
    def __init__(self, d_model, n_levels, n_heads, n_points):
        super().__init__()


class Renamed(MSDeformAttn):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.projection = self.output_proj
        del self.output_proj


class NoArguments:
    def __call__(self):
        pass


def any_number(*tensors):
    return five(*tensors)


def exits(value, shapes, starts, locations, weights):
    raise SystemExit(0)


def halved(*tensors):
    return five(*tensors) / 2


def exchanged(value, shapes, locations, weights):
    return four(value, shapes, locations.flip(-1), weights)


def sampled_with(**options):
    sample = torch.nn.functional.grid_sample

    def other(*arguments, **usual):
        return sample(*arguments, **{**usual, **options})

    def call(value, shapes, locations, weights):
        with mock.patch("torch.nn.functional.grid_sample", other):
            return four(value, shapes, locations, weights)

    return call


corners, border = sampled_with(align_corners=True), sampled_with(padding_mode="border")


def in_a_tuple(*tensors):
    return (five(*tensors),)


def with_heads(*tensors):
    return five(*tensors).unflatten(-1, (tensors[0].shape[2], -1))


def writes_afterwards(value, shapes, starts, locations, weights):
    output = five(value, shapes, starts, locations, weights)
    with torch.no_grad():
        locations.fill_(0.5)
        weights.zero_()
    return output


def writes_levels(value, shapes, starts, locations, weights):
    output = five(value, shapes, starts, locations, weights)
    starts.zero_()
    return output


class Own(BaseException):
    pass


def own_exception(*tensors):
    raise Own("of mine")


def leaves(value, shapes, starts, locations, weights):
    print("here I am")
    if len(shapes) > 1:
        os._exit(0)
    return five(value, shapes, starts, locations, weights)


def crashes(*tensors):
    os.kill(os.getpid(), signal.SIGSEGV)


def detached(*tensors):
    return five(*tensors).detach()


linear, no_arguments = nn.Linear(3, 3), NoArguments()
"""


@pytest.fixture(autouse=True)
def here(monkeypatch, request):
    """In this process, since another takes seconds to start; `own_process` marks what is about the other one."""
    if "own_process" not in request.fixturenames:
        monkeypatch.setattr(
            user_module, "_in_a_process_of_its_own", lambda _, asked: user_module.examined(asked)
        )


@pytest.fixture
def own_process():
    """Asked for by tests whose checks run as the user's do."""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(THEIRS)
    return path


@pytest.fixture
def check(file, capfd):
    def run(name: str, *options: str) -> tuple[int, str, str]:
        usual = ("--case", "hub-small", "--case", "far-outside", "--device", "cpu")
        return main(["check", "--module", f"{file}:{name}", *usual, *options]), *capfd.readouterr()

    return run


@pytest.mark.parametrize("name", ["five", "four", "any_number", "Right", "MSDeformAttn"])
def test_right_ones_pass(check, name):
    status, said, _ = check(name)
    assert status == 0, said
    assert "(4 is the limit)" in said
    assert "2 checks in" in said
    assert "0 FAILED" in said


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["in_one_dtype", "Right", "MSDeformAttn"])
def test_right_ones_pass_in_16_bits(name, dtype, file, capsys):
    assert main(["check", "--module", f"{file}:{name}", "--dtype", dtype, "--device", "cpu"]) == 0
    assert "24 checks in" in capsys.readouterr().out


def test_a_layer_that_rounds_locations_to_16_bits_passes():
    """With random reference points some of these would round over the edge of a cell."""
    wanted = ["--case", "bev-tiny", "--dtype", "fp16", "--device", "cpu", "--seed", "2"]
    assert main(["check", "--module", f"{layers_of_others.__file__}:MSDeformAttn", *wanted]) == 0


@pytest.mark.parametrize(
    "name, named",
    [
        ("FlippedLocations", "gradient of locations is off by"),
        ("NoWeights", "gradient of weights is off by"),
        ("Swapped", "output is off by"),
        ("exchanged", "; it is what comes with x and y exchanged"),
        ("corners", "; it is what comes with align_corners=True"),
        ("border", "; it is what comes with padding_mode='border'"),
        ("exits", "raised SystemExit: 0"),
        ("own_exception", "raised Own: of mine"),
        ("writes_levels", "it writes into its inputs: spatial_shapes, level_start_index"),
        ("writes_afterwards", "it writes into its inputs: locations, weights"),
        ("in_a_tuple", "it returned a tuple, expected a tensor"),
        ("with_heads", "output has shape ["),
        ("detached", "its output has no gradient"),
    ],
)
def test_wrong_ones_fail_and_it_says_where(check, name, named):
    status, said, _ = check(name)
    assert status == 1
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert any(named in line for line in failed)
    assert "check --case hub-small --dtype fp32 --device cpu --module " in said


def test_another_mistake_is_given_no_name(check):
    _, said, _ = check("halved")
    assert "output is off by" in said
    assert "what comes with" not in said


def test_only_what_is_wrong_is_named(check):
    _, said, _ = check("FlippedLocations")
    assert all("gradient of locations" in line for line in said.splitlines() if line.startswith("FAILED"))


@pytest.mark.parametrize(
    "name, named",
    [
        ("OtherLayer", "OtherLayer does not fit"),
        ("Renamed", 'Unexpected key(s) in state_dict: "output_proj.weight"'),
        ("linear", "got an instance of Linear"),
        ("no_arguments", "got NoArguments of 0 arguments"),
        ("three", "got three of 3 arguments"),
        ("none", "has no 'none'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(check, name, named):
    status, _, said = check(name)
    assert status == 2
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "content, named",
    [
        (None, "cannot be imported: FileNotFoundError: "),
        ("def (", "cannot be imported: SyntaxError: "),
        ("raise RuntimeError('no\\nGPU')", "cannot be imported: RuntimeError: no GPU"),
        ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),
        ("class Own(BaseException): pass\nraise Own(1)", "cannot be imported: Own: 1"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_sentence(content, named, tmp_path, capsys):
    file = tmp_path / "not_importable.py"
    if content is not None:
        file.write_text(content)
    assert main(["check", "--module", f"{file}:name"]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", [":name", "theirs.py:", "theirs"])
def test_half_a_name_is_told_what_a_whole_one_is(name, capsys):
    assert main(["check", "--module", name]) == 2
    assert f"--module takes package.module:Name or file.py:Name; got {name!r}" in capsys.readouterr().err


def test_a_module_that_does_not_exist_is_one_sentence(capsys):
    assert main(["check", "--module", "no.such.module:Name"]) == 2
    assert "no.such.module cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, failures",
    [
        ("five", []),
        ("leaves", ["its process ended with 0, before this check was done", "not checked"]),
        ("crashes", ["its process ended with SIGSEGV, before this check was done", "not checked"]),
    ],
)
def test_what_ends_the_process_has_failed_and_is_in_the_report(name, failures, check, own_process, tmp_path):
    status, said, _ = check(name, "--junit", str(tmp_path / "junit.xml"))
    assert status == int(bool(failures))
    assert "2 checks in" in said
    assert ("here I am" in said) == (name == "leaves")  # its author sees its prints
    found = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("failure")
    told = [failure.get("message") for failure in found]
    assert [one.split(":")[0] for one in told] == failures


@pytest.mark.parametrize("content, status", [("import os; os._exit(0)", 1), ("name = 5", 2)])
def test_what_ends_the_process_at_once_and_what_is_refused_there(
    content, status, own_process, tmp_path, capsys
):
    path = tmp_path / "mine.py"
    path.write_text(content)
    assert main(["check", "--module", f"{path}:name", "--case", "hub-small"]) == status
    output, errors = capsys.readouterr()
    assert ("its process ended with 0" in output) == (status == 1)
    assert errors.count("\n") == (status == 2)
