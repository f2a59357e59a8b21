# SPDX-License-Identifier: Apache-2.0
# The compiled module (csrc/bindings.cpp).
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

version: str
compiler: str
cuda_version: str | None
cuda_architectures: str
cuda_reason: str

# Versions of the driver and of the runtime that the kernels are linked to: 12020 is 12.2, and 0 is none.
def cuda_driver() -> tuple[int, int]: ...
def compiled_cpu_isas() -> list[str]: ...
def supported_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...

# See csrc/host.
class Signer:
    def __init__(self, borrow: object, room: object, tensor: type, parameter: type) -> None: ...
    def __call__(self, tensors: tuple[Tensor | None, ...]) -> bytes | None: ...

class Watch:
    def __init__(self, watchers: tuple[object, ...], forward_ad: dict[str, Any]) -> None: ...
    def __call__(self) -> bool: ...

def fast_path(
    signer: Signer,
    watched: Watch,
    asks_gradients: Callable[[], bool],
    tensors: int,
    defaults: tuple[object, ...],
    recorded: tuple[int, ...],
    plans: dict[Any, Any],
    all_outputs: bool,
) -> Callable[..., Any]: ...
def fast_backward(
    signer: Signer,
    watched: Watch,
    asks_gradients: Callable[[], bool],
    signatures: Sequence[bytes],
    kernel: Callable[..., Any],
) -> Callable[..., Any]: ...

# Shape of an output that a call allocates, its dtype (None: that of the first tensor), and whether it is zeros.
Spec = tuple[Sequence[int], torch.dtype | None] | tuple[Sequence[int], torch.dtype | None, bool]
# A function of an op's tensors, with None for absent ones. It returns the op's output, or a tuple of its outputs.
Forward = Callable[..., Any]
# A function of the needed flags, grad_output and the tensors. It returns the gradients, None for those not needed.
Backward = Callable[..., tuple[Tensor | None, ...]]

class AdapterOptions(TypedDict):
    activation: str
    factor: float
    residual_is_x: bool
    threshold: int
    rescale: float

class AttentionOptions(TypedDict):
    fused: bool
    points_per_level: Sequence[int]
    method: str
    checks_levels: bool

class Host:
    def __init__(
        self,
        *,
        cuda: bool,
        borrow: object,
        device: int,
        where: Callable[[], int],
        workspace: Callable[[Tensor, int], Tensor],
    ) -> None: ...
    def adapter_bottleneck_forward(
        self, outputs: Iterable[Spec], **options: Unpack[AdapterOptions]
    ) -> Forward: ...
    def adapter_bottleneck_backward(
        self, outputs: Iterable[Spec], **options: Unpack[AdapterOptions]
    ) -> Backward: ...
    def ms_deform_attn_forward(
        self, outputs: Iterable[Spec], **options: Unpack[AttentionOptions]
    ) -> Forward: ...
    def ms_deform_attn_backward(
        self, outputs: Iterable[Spec], **options: Unpack[AttentionOptions]
    ) -> Backward: ...
    def ms_deform_attn_cells(
        self, outputs: Iterable[Spec], **options: Unpack[AttentionOptions]
    ) -> Forward: ...
    def ms_deform_attn_gather_grad_value(
        self, outputs: Iterable[Spec], **options: Unpack[AttentionOptions]
    ) -> Forward: ...
    def token_pool_forward(self, outputs: Iterable[Spec]) -> Forward: ...
    def token_pool_backward(self, outputs: Iterable[Spec]) -> Backward: ...
    def token_project_forward(self, outputs: Iterable[Spec]) -> Forward: ...
    def token_project_backward(self, outputs: Iterable[Spec]) -> Backward: ...
    def check_levels(self, op: str, shapes: Tensor, starts: Tensor, pixels: int) -> None: ...
