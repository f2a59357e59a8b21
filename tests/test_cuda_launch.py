# SPDX-License-Identifier: Apache-2.0
"""Guards and launches of csrc/common/launch.cuh on a fake runtime with two devices (tests/fake_runtime): created
contexts, the current device afterwards, errors, shared memory. Also the real runtime with a fake driver without a
card."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitkern import _C

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "fake_runtime"
MUCH = "233472 bytes>>> on device 0: invalid"


def compile_cpp(source: str, built: Path, *options: str) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++")
    command = [compiler, "-std=c++17", "-Wall", "-Werror", *options, HERE / source, "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return built


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    options = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", '-DVITKERN_CUDA_ARCHITECTURES="90"']
    return compile_cpp("launching.cpp", tmp_path_factory.mktemp("launch") / "launching", *options)


@pytest.mark.xdist_group("launch")  # one worker compiles the program
@pytest.mark.parametrize(
    "scenario, told, contexts, current, launches, switches, limits_set",
    [
        # A launch leaves the thread's context as it was, and makes no context on GPU 0 by the way.
        ("no_context", [], "1", "none", "1:-7", 1, 0),
        ("no_context_twice", [], "1", "none", "1:-7 1:-7", 2, 0),
        ("no_context_on_its_device", [], "0", "none", "0:-8", 1, 0),
        ("current_device", [], "1", "1", "1:-7", 0, 0),
        ("another_device", [], "0 1", "0", "1:-7", 1, 0),
        # An error is told once, by the call that it is of.
        ("no_such_device", ["cudaSetDevice(7): invalid device ordinal"], "0", "0", "0:-8", 0, 0),
        ("no_blocks", ["kernel <<<(0, 1, 1), 32, 0 bytes>>> on device 0: invalid"], "0", "0", "0:-8", 0, 0),
        ("an_error_of_others", [], "0", "0", "0:-8", 0, 0),
        # The limit never sinks under a launch of another thread, and is set once for a device.
        ("much_and_less", [], "0", "0", "0:-8 0:-8 0:-8", 0, 1),
        ("much_on_two_devices", [], "0 1", "0", "0:-8 1:-7", 1, 2),
        ("too_much", [MUCH], "0", "0", "0:-8", 0, 1),
    ],
)
def test_a_launch(program, scenario, told, contexts, current, launches, switches, limits_set):
    done = subprocess.run([program, scenario], capture_output=True, text=True, check=True)
    *errors, found, left, launched, switched, allowed, error = done.stdout.splitlines()
    assert len(errors) == len(told) and all(map(str.endswith, errors, told)), errors
    assert [found, left, launched] == [f"contexts {contexts}", f"current {current}", f"launches {launches}"]
    assert [switched, allowed] == [f"switches {switches}", f"limits set {limits_set}"]
    theirs = scenario == "an_error_of_others"
    assert error == f"last error {int(theirs)}"


@pytest.mark.skipif(_C.cuda_version is None, reason="built without CUDA")
@pytest.mark.skipif(sys.platform != "linux", reason="the driver is a libcuda.so")
def test_the_driver_is_asked_for_its_version_and_for_no_context(tmp_path):
    compile_cpp("driver.cpp", tmp_path / "libcuda.so.1", "-shared", "-fPIC")
    code = f"import sys; sys.path.insert(0, {str(Path(_C.__file__).parent)!r}); import _C; print(*_C.cuda_driver())"
    for driver in ("11080", "12020", "13000"):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_DRIVER": driver}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split()[:1] == [driver], (done.returncode, done.stderr)
