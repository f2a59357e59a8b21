# SPDX-License-Identifier: Apache-2.0
"""The machine code that nvcc makes of all CUDA kernels of ms_deform_attn; no card is needed.

benchmarks/static has the tools and the figures for D = 32; these tests hold for every kernel.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks.static import compilers, sass
from benchmarks.static.figures import MULTIPROCESSORS, occupancy
from tests.helpers import of_cards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compilers.nvcc() is None, reason="no nvcc"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump: neither a toolkit's nor Triton's"),
]
OP = "ms_deform_attn"
LEVELS = 64  # bytes of the table that the launch asks for


@pytest.fixture(scope="module", params=of_cards(MULTIPROCESSORS, "attention"), ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    kernels = compilers.kernels_of(OP, request.param, tmp_path_factory.mktemp(f"sm_{request.param}"))
    return request.param, kernels


def vectorised(kernels, name):
    """The kernels of a pass that move whole vectors, in both forms."""
    chosen = {n: k for n, k in kernels.items() if re.match(rf"{OP}_{name}<\w+, (16|32|64),", n)}
    assert chosen
    return chosen.items()


def test_all_kernels_are_there_and_none_spills(compiled):
    _, kernels = compiled
    names = Counter(name.split("<")[0] for name in kernels)
    # 16, 32, 64 and any number of channels in three dtypes, any number alone in double; two forms of everything.
    assert names[f"{OP}_forward"] == names[f"{OP}_backward"] == 2 * (4 * 3 + 1)
    assert names[f"{OP}_cells"] == names[f"{OP}_gather_grad_value"] == 2 * 4
    assert {name: kernel.stack for name, kernel in kernels.items() if kernel.stack} == {}


def test_half_of_an_sm_is_occupied(compiled):
    arch, kernels = compiled
    for name, kernel in kernels.items():
        resident = occupancy(kernel.registers, kernel.shared + LEVELS, 256, arch)
        assert resident >= (25 if "double" in name else 50), (name, kernel.registers, kernel.shared)


def test_channels_are_read_16_bytes_at_a_time_in_both_passes(compiled):
    for name, others in (("forward", 0), ("backward", 1)):  # backward: grad_output as well
        for which, kernel in vectorised(compiled[1], name):
            assert sum(kernel.opcodes(r"LDG\.E\.128").values()) >= 4 + others, which


def test_gradients_of_value_are_added_four_floats_at_a_time_where_the_card_can(compiled):
    arch, kernels = compiled
    for which, kernel in vectorised(kernels, "backward"):
        reductions = kernel.opcodes(r"REDG?\.")
        wide = sum(number for opcode, number in reductions.items() if "x4" in opcode)
        assert (wide >= 4 and wide == sum(reductions.values())) if arch >= 90 else wide == 0, (
            which,
            reductions,
        )
