# SPDX-License-Identifier: Apache-2.0
"""Faults compiled into the kernels: the fuzzer finds each within the cases of one minute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import emulated, wide
from tests.test_check_mutations import (
    WITH_KERNELS,
    Mutation,
    cpu_mutant,
    cpu_objects,  # noqa: F401  a fixture
    emulated_mutant,
    plant_in_triton,
)
from tools.fuzzing.__main__ import main
from tools.fuzzing.call import routes

pytestmark = pytest.mark.slow


# The planted faults read at wrong addresses. A kernel that writes there may hang its process.
def _planted(op: str, file: str, right: str, wrong: str) -> Mutation:
    return Mutation(op, file, right, wrong, ())


MUTANTS = {
    "cpu": {
        "an off-by-one bound": _planted(
            "ms_deform_attn",
            "ms_deform_attn/cpu_points.h",
            "(column + next < columns)",
            "(column < columns)",
        ),
        "a swapped stride": _planted(
            "ms_deform_attn_fused",
            "ms_deform_attn/cpu_fused.h",
            "(first + query) * reference.query_stride + level.index * reference.level_stride",
            "(first + query) * reference.level_stride + level.index * reference.query_stride",
        ),
        "a missing tail": _planted(
            "token_pool",
            "common/elements.h",
            "memcpy(to + i, narrowed, (count - i) * sizeof(T));",
            "",
        ),
    },
    "cuda": {
        "an off-by-one bound": _planted(
            "ms_deform_attn",
            "ms_deform_attn/points.cuh",
            "row < level.rows;",
            "row < level.rows - 1;",
        ),
        "a swapped stride": _planted(
            "ms_deform_attn_fused",
            "ms_deform_attn/points.cuh",
            "image * task.reference.batch_stride +\n                     query * task.reference.query_stride",
            "image * task.reference.query_stride +\n                     query * task.reference.batch_stride",
        ),
        "a missing tail": _planted(
            "token_pool",
            "token_pool/forward.cuh",
            "c < p.channels; c += kBlockThreads",
            "c + 1 < p.channels; c += kBlockThreads",
        ),
    },
    "triton": {
        "an off-by-one bound": _planted(
            "token_project",
            "token_project.py",
            "logits = tl.where((token < T)[None, :]",
            "logits = tl.where((token <= T)[None, :]",
        ),
        "a swapped stride": _planted(
            "token_project",
            "token_project.py",
            "tokens_ptr + image * T * C",
            "tokens_ptr + image * N * C",
        ),
        "a missing tail": _planted(
            "token_project",
            "token_project.py",
            "write_tile(output_ptr, pixel, n < N,",
            "write_tile(output_ptr, pixel, n < N - 1,",
        ),
    },
}
# Numbers that a minute goes through on two cores, and more.
MINUTE = 1500


def arguments_of(mutation: Mutation, backend: str) -> list[str]:
    return ["--cases", str(MINUTE), "--workers", "0", "--op", mutation.op, "--backend", backend]


def assert_found_apart(mutation: Mutation, backend: str, *interpreter: object, **environment: str) -> None:
    """Checks that the fuzzer, in its own process, finds the fault by a wrong result or a crash on a guarded page."""
    command = [sys.executable, *map(str, interpreter), *arguments_of(mutation, backend)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=wide.ROOT)
    found = done.returncode == 1 and f"{mutation.op} on {backend}" in done.stdout
    assert found or done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stdout + done.stderr


@pytest.mark.parametrize("fault", MUTANTS["cpu"])
@pytest.mark.skipif(wide.REASON is not None or sys.platform != "linux", reason=wide.REASON or "for Linux")
def test_mutants_of_the_cpu_kernels_are_found(fault, cpu_objects, tmp_path):  # noqa: F811
    mutation = MUTANTS["cpu"][fault]
    library = cpu_mutant(mutation, cpu_objects, tmp_path)
    assert_found_apart(mutation, "cpu", "-c", WITH_KERNELS, "tools.fuzzing.__main__", library)


@pytest.mark.parametrize("fault", MUTANTS["cuda"])
@pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON))
def test_mutants_of_the_emulated_cuda_kernels_are_found(fault, tmp_path):
    mutation = MUTANTS["cuda"][fault]
    library = emulated_mutant(mutation, tmp_path)
    assert_found_apart(mutation, "cuda", "-m", "tools.fuzzing", VITKERN_EMULATED=str(library))


@pytest.mark.parametrize("fault", MUTANTS["triton"])
def test_mutants_of_the_triton_kernels_are_found(fault, tmp_path, monkeypatch, capsys):
    if not routes()["triton"]:
        pytest.skip("Triton is not interpreted here")
    mutation = MUTANTS["triton"][fault]
    plant_in_triton(mutation, tmp_path, monkeypatch)
    assert main(arguments_of(mutation, "triton")) == 1
    assert f"{mutation.op} on triton" in capsys.readouterr().out
