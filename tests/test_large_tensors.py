# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements: any offset computed in 32 bits would overflow."""

import pytest
import torch

import vitkern
from tests.helpers import gradients

SIDE, HEADS, CHANNELS = 1024, 34, 64  # 1024 * 1024 * 34 * 64 = 2.28e9 elements in one image
LEVELS = [(SIDE, SIDE)]


def free_gigabytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0


def corner_inputs(device: str):
    """The last pixel of the last head holds ones; two queries sample it and the first pixel."""
    value = torch.zeros(1, SIDE * SIDE, HEADS, CHANNELS, dtype=torch.bfloat16, device=device)
    assert value.numel() > 2**31
    value[0, -1, -1] = 1
    value[0, 0, 0] = 2
    locations = torch.empty(1, 2, HEADS, 1, 1, 2, device=device)
    locations[:, 0] = 0.25 / SIDE
    locations[:, 1] = 1 - 0.25 / SIDE
    return value, locations, torch.ones(1, 2, HEADS, 1, 1, device=device)


@pytest.mark.slow
@pytest.mark.skipif(free_gigabytes() < 16, reason="needs 16 GB of free memory")
def test_cpu_forward_and_backward_beyond_32_bit_offsets():
    check_far_corner("cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_forward_and_backward_beyond_32_bit_offsets(backend):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free device memory")
    check_far_corner(backend, "cuda")


ROWS = 2**31 // 1024 + 2  # of 1024 channels: a little more than 2^31 elements
FEW = 100


def row_inputs(
    op: str, dtype: torch.dtype, device: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs for two rows, or pixels: the tensors with one row for each, and the other tensors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    rows, rest = {"x": normal(2, 1024)}, {}
    if op == "adapter_bottleneck":
        rest = {"down": normal(8, 1024) / 32, "up": normal(1024, 8)}
    elif op == "token_pool":
        # Both rows have logits of 40: beside them all the rows of zeros weigh nothing.
        rows["x"][:, :512] = 1
        rest = {"weight": torch.zeros(16, 1024, device=device, dtype=dtype)}
        rest["weight"][:, :512] = 40 / 512
    else:
        rows["query"] = normal(2, 16)
        rest = {"key": normal(16, 16), "tokens": normal(16, 1024)}
    return rows, rest


def of_rows(op: str, backend: str):
    """The op on rows [N, .] of one image."""

    def run(x, *others):
        if op == "adapter_bottleneck":
            down, up = others
            return vitkern.adapter_bottleneck(x, down, None, up, None, residual=x, backend=backend)
        if op == "token_pool":
            return vitkern.token_pool(x[None], *others, backend=backend)[0]
        query, key, tokens = others
        return vitkern.token_project(x[None], query[None], key[None], tokens[None], backend=backend)[0]

    return run


def check_rows(op: str, backend: str, device: str, count: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Checks that two rows give the same output and gradients alone and as the first and last of many rows of zeros."""
    rows, rest = row_inputs(op, dtype, device)
    function = of_rows(op, backend)
    alone = gradients(function, (*rows.values(), *rest.values()))
    many = {name: row.new_zeros(count, row.shape[1]) for name, row in rows.items()}
    for name, row in rows.items():
        many[name][0], many[name][-1] = row[0], row[1]
    grad_output = torch.ones_like
    if op != "token_pool":
        grad_output = torch.zeros_like(many["x"])
        grad_output[0] = grad_output[-1] = 1
    found = gradients(function, (*many.values(), *rest.values()), grad_output)
    for name, ours, theirs in zip(("output", *rows, *rest), found, alone):
        if len(ours) == count:
            middle = ours[1:-1]
            ours = torch.stack([ours[0], ours[-1]])
            if name != "output":
                assert middle.abs().amax() <= 1e-6 * theirs.abs().amax(), name
        error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
        assert error <= 1e-2, name


@pytest.mark.parametrize("op", ["adapter_bottleneck", "token_pool", "token_project"])
def test_rows_among_a_few(op):
    """The same as the next test, which needs a card, with few enough rows for a CPU."""
    check_rows(op, "cpu", "cpu", FEW, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", ["adapter_bottleneck", "token_pool", "token_project"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_rows_beyond_32_bit_offsets(backend, op):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free device memory")
    check_rows(op, backend, "cuda", ROWS)


def check_far_corner(backend, device):
    value, locations, weights = corner_inputs(device)

    def attend(value, locations, weights):
        return vitkern.ms_deform_attn(value, LEVELS, None, locations, weights, backend=backend)

    output, grad_value, _, grad_weights = gradients(attend, (value, locations, weights))
    output = output.view(2, HEADS, CHANNELS)
    share = 0.75 * 0.75  # a quarter of a pixel from the outer edge: the corner pixel's coefficient
    assert (output[0, 0] == 2 * share).all()
    assert (output[1, -1] == share).all()
    assert output.count_nonzero() == 2 * CHANNELS
    assert (grad_value[0, 0] == share).all()
    assert (grad_value[0, -1] == share).all()
    assert grad_value[0, 1:-1].view(torch.int16).amax() == 0
    assert grad_weights[0, 0, 0].item() == 2 * share * CHANNELS
    assert grad_weights[0, 1, -1].item() == share * CHANNELS
