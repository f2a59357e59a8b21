# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels made of matrix products, compiled without a card. Numbers of channels and hidden units are no
compile-time constants, so the tests hold for all of them."""

from __future__ import annotations

import pytest

from benchmarks.static import compilers, sass
from benchmarks.static.figures import MULTIPROCESSORS
from tests.helpers import of_cards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compilers.nvcc() is None, reason="no nvcc"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump: neither a toolkit's nor Triton's"),
]
OPS = ("adapter_bottleneck", "token_pool", "token_project")
WITHOUT_PRODUCTS = ("add_parts", "adapter_bottleneck_grad_scale", "token_pool_merge")
LOW = ("__half", "__nv_bfloat16")


@pytest.fixture(scope="module", params=of_cards(MULTIPROCESSORS, "products"), ids=lambda arch: f"sm_{arch}")
def kernels(request, tmp_path_factory):
    """The kernels by name, such as row_sums<float>; a kernel that several ops use appears once."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    found = {}
    for op in OPS:
        found |= compilers.kernels_of(op, request.param, folder)
    return found


def products(kernels, dtypes):
    """The kernels of these types that multiply matrices."""
    chosen = {}
    for name, kernel in kernels.items():
        function, arguments = name.rstrip(">").split("<")
        if function not in WITHOUT_PRODUCTS and arguments.split(",")[0] in dtypes:
            chosen[name] = kernel
    return chosen.items()


def count(kernel, opcode):
    return sum(kernel.opcodes(opcode).values())


def test_all_kernels_are_there_and_none_spills(kernels):
    functions = {name.split("<")[0] for name in kernels}
    assert functions == {f"{op}_{way}" for op in OPS for way in ("forward", "backward")} | {
        *WITHOUT_PRODUCTS,
        "row_sums",
    }
    assert {name: kernel.stack for name, kernel in kernels.items() if kernel.stack} == {}


def test_registers_leave_room_for_two_blocks(kernels):
    for name, kernel in products(kernels, ("float", *LOW)):
        assert kernel.registers <= 128, name


def test_all_shared_memory_is_asked_for_at_the_launch(kernels):
    """launch.cuh allows as much dynamic shared memory as a block can have; static shared memory would reduce it."""
    assert {
        name: kernel.shared for name, kernel in products(kernels, ("float", "double", *LOW)) if kernel.shared
    } == {}


def test_products_of_16_bits_run_on_tensor_cores(kernels):
    for name, kernel in products(kernels, LOW):
        assert count(kernel, r"HMMA\.16816\.F32") >= 4, name
        assert count(kernel, "LDSM") > 0, name


def test_products_of_floats_do_not(kernels):
    """The kernels cannot see whether torch's user allows tf32, so they never use it."""
    for name, kernel in products(kernels, ("float",)):
        assert count(kernel, r"\w*MMA") == 0, name
        assert count(kernel, "FFMA") >= 32, name


def test_tiles_go_past_the_registers_16_bytes_at_a_time(kernels):
    for name, kernel in products(kernels, ("float", *LOW)):
        assert count(kernel, r"LDGSTS\..*128") > 0, name
