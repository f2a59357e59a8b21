# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels have no data race, whatever the order of threads, and each of their barriers is needed."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests import emulated, races
from tests.documents import ROOT, blocks
from tests.race_cases import CASES, Case

pytestmark = pytest.mark.skipif(races.REASON is not None, reason=str(races.REASON))


def reported(case: Case, **values: object) -> str:
    """The race detector's report of a call, if there is one."""
    call = case.make()
    try:
        with races.kernels(call.inputs, BLOCKS=case.blocks, **values):
            call.ours()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_accesses_race(case):
    assert reported(case) == ""


def test_every_kernel_has_a_case_of_two_blocks():
    """Every compiled kernel instance runs with two blocks or more; the gradient of scale has one block only."""
    for case in CASES:
        call = case.make()
        with races.kernels(BLOCKS=0):
            call.ours()
    launched = races.launched_kernels()
    assert sorted(launched) == sorted(races.compiled_kernels().values())
    small = {kernel for kernel, blocks in launched.items() if blocks < 2 and "grad_scale" not in kernel}
    assert not small


@pytest.mark.parametrize("barrier", races.barriers())
def test_every_barrier_is_needed(barrier):
    """If the detector ignores a barrier, which still waits, at least one case has a race."""
    folder = barrier.split("/")[0]
    op = "adapter_bottleneck" if folder == "common" else folder
    said = (reported(case, WITHOUT=barrier) for case in CASES if case.op == op)
    found = any("races of emulated kernel" in text for text in said)
    assert found, f"nothing races without {barrier}: it may go, or a case is missing"


# ---- The detector itself


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A function that runs a kernel of tests/emulator/races.cu, with the race detector by default."""
    folder, built = tmp_path_factory.mktemp("races"), {}

    def run(kernel: str, detector: bool = True, **values: object) -> str:
        if detector not in built:
            built[detector] = emulated.compile_program("races.cu", folder, watch="races" if detector else "")
        environment = {**os.environ, **{f"CUDA_EMU_{name}": str(value) for name, value in values.items()}}
        done = subprocess.run(
            [built[detector], kernel], capture_output=True, text=True, env=environment, timeout=60
        )
        return races.readable(done.stdout + done.stderr, built[detector])

    return run


FAULTS = {
    "no_barrier_but_a_shuffle": ("reads staged", "writes it"),
    "no_barrier_but_a_vote": ("reads staged", "writes it"),
    "no_barrier_but_ldmatrix": ("reads staged", "writes it"),
    "no_barrier_before_the_next_round": ("writes staged", "reads it"),
    "a_barrier_of_half_the_lanes": ("reads staged", "writes it"),
    "a_copy_into_what_is_read": ("writes staged", "reads it"),
    "a_wait_without_a_barrier": ("reads staged", "writes it"),
    "a_copy_from_what_is_written": ("reads memory", "writes it"),
    "the_wait_of_another_group": ("writes staged", "reads it"),
    "a_plain_write_beside_an_atomic": ("writes memory", "updates it"),
    "two_blocks_write_the_same": ("writes memory", "writes it"),
    "a_read_of_another_block": ("reads memory", "writes it"),
    "an_atomic_as_a_flag": ("reads number", "writes it"),
    "all_lanes_write_the_same": ("writes of_warp", "writes it"),
    "shared_memory_that_nothing_has_written": ("reads staged", "that nothing has written"),
    "an_update_in_two_steps": ("writes sum", "writes it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_races_are_told_by_both_lines(program, fault):
    said = program(fault)
    mine, other = FAULTS[fault]
    line = next(line for line in said.splitlines() if f"{mine} " in line and other in line)
    assert f"{fault}: thread " in line
    assert line.count("emulator/races.cu:") == (1 if "nothing has written" in other else 2)


@pytest.mark.parametrize("fault", ["fine", *FAULTS])
def test_planted_races_do_no_harm_where_threads_take_turns(program, fault):
    """So the emulator without the detector does not find them."""
    assert "right" in {program(fault, detector=False, ORDER=order).strip() for order in (0, 1)}


def test_no_race_is_told_where_there_is_none(program):
    assert {program("fine", ORDER=order).strip() for order in (0, 1)} == {"right"}


def test_a_barrier_that_is_switched_off_orders_nothing(program):
    source = (emulated.ROOT / "tests" / "emulator" / "races.cu").read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if "__syncwarp();" in text)
    assert "reads staged" in program("fine", WITHOUT=f"races.cu:{line}")


@pytest.mark.parametrize("fault", ["a_copy_into_what_is_read", "an_update_in_two_steps"])
def test_some_schedule_shows_what_a_race_does_and_its_seed_repeats_it(program, fault):
    said = [program(fault, RACES=0, SEED=seed) for seed in range(1, 21)]
    assert "wrong\n" in said
    assert said == [program(fault, RACES=0, SEED=seed) for seed in range(1, 21)]


@pytest.mark.parametrize("flags", [(), ("-DFORGET",)], ids=["right", "without its barrier"])
def test_the_kernel_of_the_page(flags, tmp_path):
    (block,) = blocks(ROOT / "docs" / "emulator.md", "cuda")
    (tmp_path / "mine.cu").write_text(block.text)
    program = emulated.compile_program(tmp_path / "mine.cu", tmp_path, watch="races", flags=flags)
    said = races.readable(subprocess.run([program], capture_output=True, text=True).stdout, program)
    if not flags:
        assert said == "3568 7664\n"
    else:
        assert "thread 0 of block (0, 0, 0) reads sums + 4 bytes" in said
        assert "thread 32 of block (0, 0, 0) writes sums + 4 bytes" in said
        assert "unordered with it, thread 0 of block (0, 0, 0) reads it at" in said


@pytest.mark.parametrize("seed", range(1, 6))
def test_races_are_found_in_every_schedule(program, seed):
    assert program("fine", SEED=seed).strip() == "right"
    assert "reads staged" in program("no_barrier_but_a_vote", SEED=seed)
