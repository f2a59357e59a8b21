# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels' own parts: vectors and their tails, tiles, the ways to split the work, element conversions.

The contract of all backends is in tests/test_contract.py.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from tests import wide
from tests.helpers import launch_backward, launch_forward
from tests.runners import RUNNERS
from vitkern import _C, reference
from vitkern.ops import native

LEVELS = ((12, 17), (6, 9), (3, 4), (1, 1))
FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [(FP32, FP32), (FP64, FP64), (FP16, FP16), (FP16, FP32), (BF16, BF16), (BF16, FP32)]


@pytest.fixture(params=[pytest.param(r, id=r.name, marks=r.marks) for r in RUNNERS if r.backend == "cpu"])
def isa(request):
    with request.param.active():
        yield


def make(B=2, Q=21, M=3, D=32, levels=LEVELS, points=(4, 4, 4, 4), dtype=FP32, coord_dtype=None, outside=1.5):
    """Inputs with locations away from the edges of cells, where the gradient of locations jumps."""
    shapes = torch.tensor(levels, dtype=torch.int64).reshape(-1, 2)
    sizes = shapes.prod(1)
    start = sizes.cumsum(0) - sizes
    counts = torch.tensor(points, dtype=torch.int64)
    size_of_point = shapes.flip(1).repeat_interleave(counts, 0).double()  # [K, 2] as (width, height)
    random = torch.rand(B, Q, M, sum(points), 2, dtype=FP64)
    cell = (torch.rand_like(random) * (size_of_point + 2 * outside) - outside).floor()
    locations = (cell + 0.05 + 0.9 * random + 0.5) / size_of_point.clamp(min=1)
    weights = torch.rand(B, Q, M, sum(points), dtype=FP64)
    value = torch.randn(B, int(sizes.sum()), M, D, dtype=FP64)
    coord_dtype = coord_dtype or dtype
    return value.to(dtype), shapes, start, locations.to(coord_dtype), weights.to(coord_dtype), tuple(points)


def oracle(inputs, method, grad_output):
    """Output and the three gradients in fp64."""
    value, shapes, start, locations, weights, points = inputs
    leaves = [t.double().requires_grad_() for t in (value, locations, weights)]
    output = reference.ms_deform_attn(leaves[0], shapes, start, leaves[1], leaves[2], points, method)
    if not output.requires_grad:
        return output, *(torch.zeros_like(leaf) for leaf in leaves)
    gradients = torch.autograd.grad(
        output, leaves, grad_output.double(), allow_unused=True, materialize_grads=True
    )
    return output.detach(), *gradients


def kernel(inputs, method, grad_output, needed=(True, True, True)):
    output = launch_forward("cpu", *inputs, method)
    return output, *launch_backward("cpu", grad_output, needed, *inputs, method)


def assert_matches_oracle(inputs, method="bilinear"):
    value, locations = inputs[0], inputs[3]
    grad_output = torch.randn(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]).to(
        value.dtype
    )
    expected = oracle(inputs, method, grad_output)
    for name, got, want in zip(
        ("output", "value", "locations", "weights"), kernel(inputs, method, grad_output), expected
    ):
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN elsewhere than in the oracle"
        if got.numel() == 0:
            continue
        # One rounding to the result's type, and sums of some hundred products in the accumulator (measured: 8 eps).
        relative = torch.finfo(got.dtype).eps + 32 * torch.finfo(native.accumulator(value.dtype)).eps
        error = (got.double() - want).nan_to_num().abs().max()
        assert error <= relative * want.nan_to_num().abs().max(), f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("channels", [5, 31, 32, 33, 130])
def test_channels_that_leave_every_kind_of_tail(isa, channels, dtypes, method):
    assert_matches_oracle(make(D=channels, dtype=dtypes[0], coord_dtype=dtypes[1]), method)


@pytest.mark.parametrize("points", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_numbers_of_levels_and_points(isa, levels, points):
    assert_matches_oracle(make(levels=((5, 7), *LEVELS)[:levels], points=(points,) * levels, D=16, Q=19))


def test_more_points_than_a_tile_holds(isa):
    assert_matches_oracle(make(points=(300, 1, 40, 7), Q=3))


def test_nan_leaks_neither_from_outside_nor_through_its_weight(isa):
    value, shapes, start, locations, weights, points = make(
        levels=((4, 5), (3, 3)), points=(6, 0), outside=1.2
    )
    value[:, 20:] = float("nan")  # the level that follows, which a wrong corner would read
    value[0, 7] = float("nan")  # and a pixel that inside corners do read
    weights[locations[..., 0] * 5 - 0.5 < -1] = float("nan")
    assert_matches_oracle((value, shapes, start, locations, weights, points))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_16_bit_rows_that_begin_between_two_words(isa, dtype):
    value, *others = make(D=16, dtype=dtype)
    shifted = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    assert shifted.is_contiguous() and shifted.data_ptr() % 4 == 2
    torch.testing.assert_close(
        launch_forward("cpu", shifted, *others), launch_forward("cpu", value, *others), rtol=0, atol=0
    )


@pytest.mark.parametrize("start", [[5, 220, 300, 500], [300, 0, 290, 400], [0, 100, 150, 160]], ids=str)
def test_levels_anywhere_in_value(isa, start):
    """Levels with gaps, whose gradient is zero, in any order, and overlapping, so that gradients add up."""
    _, shapes, _, locations, weights, points = make()
    value = torch.randn(2, 510, 3, 32)
    value.masked_fill_(torch.rand(2, 510, 1, 1) < 0.02, 0)
    assert_matches_oracle((value, shapes, torch.tensor(start), locations, weights, points))


@pytest.mark.parametrize("start", [[-1, 0, 0, 0], [0, 0, 0, 10_000]], ids=str)
def test_levels_outside_of_value_are_refused(isa, start):
    value, shapes, _, *rest = make()
    with pytest.raises(ValueError, match="reaches outside of value"):
        launch_forward("cpu", value, shapes, torch.tensor(start), *rest, "bilinear")


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("width", [3, 7, 10, 49, 100, 167, 334])
def test_nearest_on_the_edges_of_pixels(isa, width, dtype):
    """At (k ± 1/2) / W all instruction sets choose the oracle's pixel; a fused product and sum would choose another."""
    value = torch.arange(width, dtype=dtype).view(1, width, 1, 1).expand(-1, -1, -1, 8).contiguous()
    shapes, start = torch.tensor([[1, width]]), torch.tensor([0])
    x = (torch.arange(-1, width + 1, dtype=dtype) + 0.5) / width
    x = torch.cat([x, x.nextafter(x.new_tensor(2.0)), x.nextafter(x.new_tensor(-2.0))])
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1).view(1, -1, 1, 1, 2)
    inputs = (value, shapes, start, locations, torch.ones_like(locations[..., 0]), (1,), "nearest")
    assert torch.equal(launch_forward("cpu", *inputs), reference.ms_deform_attn(*inputs))


SPLITS = {
    "direct": {"B": 1, "M": 2, "Q": 9, "levels": ((40, 50), (20, 25)), "points": (4, 4)},
    "packed": {"B": 2, "M": 3, "Q": 301},
    "packed for backward": {"B": 2, "M": 3, "Q": 100},
    "chunked": {"B": 1, "M": 2, "Q": 2100, "levels": ((8, 9),), "points": (4,)},
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_bits_do_not_depend_on_threads(isa, split, dtype):
    inputs = make(**SPLITS[split], dtype=dtype, coord_dtype=FP32)
    assert_matches_oracle(inputs)
    grad_output = torch.randn(inputs[0].shape[0], inputs[3].shape[1], inputs[0].shape[2] * 32).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(kernel(inputs, "bilinear", grad_output))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others))


@pytest.mark.parametrize(
    "needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("split", SPLITS)
def test_only_wanted_gradients(isa, split, needed):
    inputs = make(**SPLITS[split])
    grad_output = torch.randn(inputs[0].shape[0], inputs[3].shape[1], inputs[0].shape[2] * 32)
    all_gradients = kernel(inputs, "bilinear", grad_output)[1:]
    for wanted, gradient, full in zip(
        needed, kernel(inputs, "bilinear", grad_output, needed)[1:], all_gradients
    ):
        assert torch.equal(gradient, full) if wanted else gradient is None


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_16_bit_numbers_are_widened_exactly_and_rounded_to_nearest_even(isa, dtype):
    """All 65536 patterns, times 1 and times weights whose products need rounding, including ties."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1, 1, 1)
    pixels = patterns.shape[1]
    shapes, start = torch.tensor([[1, pixels]]), torch.tensor([0])
    x = torch.arange(pixels, dtype=FP32) / pixels  # exact
    locations = torch.stack([x, torch.zeros_like(x)], -1).view(1, pixels, 1, 1, 2)
    for weight in (1.0, 0.5, 1.5, 1.0 + 2.0**-10, 2.0**-9, 1.25 * 2.0**100):
        weights = torch.full((1, pixels, 1, 1), weight)
        got = launch_forward("cpu", patterns, shapes, start, locations, weights, (1,), "nearest")
        expected = (patterns.float() * weight).to(dtype).flatten()
        assert torch.equal(got.flatten().isnan(), expected.isnan())
        assert torch.equal(got.flatten().nan_to_num(7.0), expected.nan_to_num(7.0))


def test_nothing_of_an_instruction_set_can_replace_another(tmp_path):
    """All symbols are private: if the linker merged one with its twin, AVX code could run on chips without AVX."""
    if "avx2" not in _C.compiled_cpu_isas() or wide.COMPILER is None or shutil.which("nm") is None:
        pytest.skip("one instruction set only, or no c++ or nm")
    flags = [
        "-std=c++17",
        "-O1",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-fPIC",
        "-Wno-psabi",
        "-DVITKERN_ISA=isa_avx2",
    ]
    source, compiled = wide.ROOT / "csrc" / "ms_deform_attn" / "cpu.cpp", tmp_path / "cpu.o"
    wide.run(wide.COMPILER, *flags, f"-I{wide.ROOT / 'csrc'}", "-c", source, "-o", compiled)
    listing = wide.run("nm", "-C", "--defined-only", "-g", compiled)
    symbols = [line.split(maxsplit=2)[2] for line in listing.splitlines()]
    assert symbols, "nm lists the entry points"
    assert [s for s in symbols if not s.startswith(("vitkern::isa_avx2::", "DW.ref.__gxx_personality"))] == []
