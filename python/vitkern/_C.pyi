# SPDX-License-Identifier: Apache-2.0
# The compiled module (csrc/bindings.cpp): addresses, sizes and codes. Only ops/native.py calls the kernels.
from collections.abc import Sequence

version: str
compiler: str
cuda_version: str | None
cuda_architectures: str
cuda_reason: str

def compiled_cpu_isas() -> list[str]: ...
def supported_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
def levels_tile(spatial_shapes: int, level_start: int, levels: int, pixels: int) -> bool: ...
def ms_deform_attn_forward_cpu(
    inputs: Sequence[int],
    anchors: Sequence[int],
    output: int,
    sizes: Sequence[int],
    point_end: Sequence[int],
    codes: Sequence[int],
    threads: int,
) -> None: ...
def ms_deform_attn_backward_cpu(
    inputs: Sequence[int],
    anchors: Sequence[int],
    grad_output: int,
    gradients: Sequence[int],
    sizes: Sequence[int],
    point_end: Sequence[int],
    codes: Sequence[int],
    threads: int,
) -> None: ...
def ms_deform_attn_forward_cuda(
    inputs: Sequence[int],
    anchors: Sequence[int],
    output: int,
    sizes: Sequence[int],
    point_end: Sequence[int],
    codes: Sequence[int],
    device: int,
    stream: int,
) -> None: ...
def ms_deform_attn_backward_cuda(
    inputs: Sequence[int],
    anchors: Sequence[int],
    grad_output: int,
    gradients: Sequence[int],
    sizes: Sequence[int],
    point_end: Sequence[int],
    codes: Sequence[int],
    device: int,
    stream: int,
) -> None: ...
def ms_deform_attn_cells_cuda(
    inputs: Sequence[int],
    anchors: Sequence[int],
    cells: int,
    softmax: int,
    sizes: Sequence[int],
    point_end: Sequence[int],
    codes: Sequence[int],
    device: int,
    stream: int,
) -> None: ...
def ms_deform_attn_gather_grad_value_cuda(
    inputs: Sequence[int],
    anchors: Sequence[int],
    grad_output: int,
    grad_value: int,
    order: int,
    first: int,
    softmax: int,
    sizes: Sequence[int],
    point_end: Sequence[int],
    codes: Sequence[int],
    device: int,
    stream: int,
) -> None: ...
