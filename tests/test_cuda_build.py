# SPDX-License-Identifier: Apache-2.0
"""The architectures of the CUDA kernels: those that CMakeLists.txt accepts, and those named in files and pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.static.figures import MULTIPROCESSORS
from tests.emulated import _tool
from vitkern.ops.backends import LOWEST_CARD

ROOT = Path(__file__).resolve().parents[1]
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(_tool("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    "architectures, message",
    [
        ("75-real", "names 75-real, but the CUDA kernels need instructions of sm_80: leave 75-real out"),
        ("90,70", "names 70, but the CUDA kernels need instructions of sm_80"),
        ("native", "takes numbers such as 86-real or 90, got 'native'"),
        ("8.6", "got '8.6': write the compute capability of your card without the point"),
        ("90a", "got '90a'"),
    ],
)
def test_architectures_that_cannot_be_are_refused(architectures, message, tmp_path):
    """They are refused before CMake looks for a compiler."""
    command = [_tool("cmake"), "-S", ROOT, "-B", tmp_path, f"-DVITKERN_CUDA_ARCHITECTURES={architectures}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_the_lowest_card_is_the_same_everywhere_and_compiled_for_in_tests():
    assert min(MULTIPROCESSORS) == LOWEST_CARD
    assert f"CMAKE_MATCH_1 LESS {LOWEST_CARD}" in CMAKE
    for page in ("README.md", "docs/backends.md", "docs/install.md"):
        told = re.findall(r"sm_(\d+) and later", (ROOT / page).read_text(encoding="utf-8"))
        assert told and set(told) == {str(LOWEST_CARD)}, page


def test_the_default_architectures_are_told_and_compiled_for_in_tests():
    (default,) = re.findall(r"set\(VITKERN_GPUS (80-real .* 120)\)", CMAKE)
    numbers = [int(one.partition("-")[0]) for one in default.split()]
    assert numbers == list(MULTIPROCESSORS)
    assert default in (ROOT / "docs" / "environment.md").read_text(encoding="utf-8").replace(",", " ")
