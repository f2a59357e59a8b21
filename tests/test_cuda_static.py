# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compiled for cards that are not here: what nvcc made of them is held in place.

Registers decide how many warps hide the latency of the gathers: 64 of them let half of an SM's threads run.
"""

from __future__ import annotations

import pytest

from tests import sass

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sass.nvcc() is None, reason="no nvcc")]
ARCHES = (80, 90, 100, 120)
BYTES = {"fp32": 4, "fp64": 8, "fp16": 2, "bf16": 2}
SHARED_OF_SM = {80: 164, 90: 228, 100: 228, 120: 100}  # KiB


@pytest.fixture(scope="module", params=ARCHES, ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    return request.param, sass.compile_kernels(request.param, tmp_path_factory.mktemp(f"sm_{request.param}"))


def fast(kernels, name):
    """The kernels of a pass that move whole vectors, of both forms."""
    return [kernel for kernel in kernels if kernel.name == f"ms_deform_attn_{name}" and kernel.channels]


def test_all_kernels_are_there_and_none_spills(compiled):
    _, kernels = compiled
    dtypes = len(BYTES)
    by_channels = 2 * (4 * dtypes - 3)  # forward and backward: 16, 32, 64 and any, but for doubles any alone
    assert len(kernels) == 2 * (by_channels + 2 * dtypes)  # in two forms; filing and gathering once a dtype
    assert [kernel for kernel in kernels if kernel.spilled] == []


def test_half_of_an_sm_is_occupied(compiled):
    arch, kernels = compiled
    for kernel in kernels:
        blocks = (
            2 if kernel.dtype == "fp64" else 4 if arch != 120 else 3
        )  # of 2048 threads, on sm_120 of 1536
        assert kernel.registers * 256 * blocks <= 65536, kernel
        assert (kernel.shared + 1024) * blocks <= SHARED_OF_SM[arch] * 1024, kernel


def test_channels_are_read_16_bytes_at_a_time_in_both_passes(compiled):
    for name, others in (
        ("forward", 0),
        ("backward", 2),
    ):  # backward: grad_output as well, once for each method
        for kernel in fast(compiled[1], name):
            assert kernel.ptx.count("ld.global.nc.v4.") >= 5 + others, (
                kernel.name,
                kernel.dtype,
                kernel.channels,
            )


def test_gradients_of_value_are_added_four_floats_at_a_time_where_the_card_can(compiled):
    arch, kernels = compiled
    for kernel in fast(kernels, "backward"):
        vectors, scalars = kernel.ptx.count(".add.v4.f32"), kernel.ptx.count("global.add.f")
        if arch >= 90 and kernel.dtype != "fp64":
            assert (vectors >= 5, scalars) == (True, 0), (kernel.dtype, kernel.channels)
        else:
            assert (vectors, scalars >= 10) == (0, True), (kernel.dtype, kernel.channels)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.skipif(sass.disassembler() is None, reason="no cuobjdump: neither a toolkit's nor Triton's")
@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [
        ("forward", "fp32", 8),
        ("forward", "fp16", 10.5),
        ("forward", "bf16", 10.5),
        ("backward", "fp32", 25),
        ("backward", "fp16", 21),
    ],
)
def test_instructions_for_a_sampled_point_and_channel(compiled, name, dtype, allowed, fused):
    """In the loop over the points of D = 32, bilinear; the original kernels of Deformable-DETR spend 82 and 272."""
    arch, kernels = compiled
    (kernel,) = (
        kernel
        for kernel in fast(kernels, name)
        if (kernel.dtype, kernel.channels, kernel.fused) == (dtype, 32, fused)
    )
    channels = 16 // BYTES[dtype]
    counts = []
    for body in kernel.loops():
        loads = sum("LDG.E.128" in text for text in body)
        counts += [len(body) / (loads / 4) / channels] if loads and loads % 4 == 0 else []
    assert min(counts) <= (allowed if arch >= 90 else allowed * 1.5), counts
