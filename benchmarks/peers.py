# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.peers: lists the other implementations of ms_deform_attn that are installed, and their mistakes.

Each peer is called as its documentation says, on the same inputs. Before it is timed, its output and all gradients
are compared with the float64 oracle. The table also names peers that are absent, wrong, or do not support a case.
requirements/peers.txt lists the peers that can be installed beside vitkern, in the supported versions.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vitkern
from vitkern import reference
from vitkern.bench.verify import LIMITS, relative_error
from vitkern.cases import ATTENTION_CASES, MsDeformAttnInputs, inside_a_cell, make_inputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of value, locations, weights: [B, Q, M * D]
IM2COL_STEP = 64
RESULTS = ("output", "gradient of value", "gradient of locations", "gradient of weights")


@dataclass(frozen=True)
class Peer:
    """A peer: `load` returns its function, and `bind` turns that into a function of value, locations and weights."""

    name: str
    package: str  # as the index of packages has it
    version: str  # the one that this has been written for, if any
    load: Callable[[], Callable]
    bind: Callable[[Callable, MsDeformAttnInputs], Attention]
    devices: tuple[str, ...] = ("cpu", "cuda")

    def attention(self, inputs: MsDeformAttnInputs) -> Attention:
        return self.bind(_loaded(self), inputs)

    def objection(self, device: str) -> str | None:
        """The reason why the peer cannot be called on a device, or None."""
        other_version = self._version_objection()
        if other_version is not None:
            return f"absent: {other_version}"
        try:
            _loaded(self)
        except Exception as error:  # a peer may fail to load in any way; which one it was is the verdict
            return f"absent: {_first_line(error)}"
        return None if device in self.devices else f"unsupported: {device}"

    def verdict(self, inputs: MsDeformAttnInputs, oracle: list[Tensor] | None = None) -> str:
        """ "right", or the reason why it has no time: absent, unsupported or wrong, with the error.

        `oracle`: the expected results; None: those of oracle_of(inputs).
        """
        objection = self.objection(inputs.value.device.type)
        if objection is not None:
            return objection
        try:
            results = _results(self.attention(inputs), inputs)
        except Exception as error:
            return f"unsupported: {_first_line(error)}"
        errors = map(relative_error, results, oracle_of(inputs) if oracle is None else oracle)
        worst, what = max(zip(errors, RESULTS))
        limit = LIMITS[inputs.value.dtype]
        return "right" if worst <= limit else f"wrong: {what} off by {worst:.1e} of its largest value"

    def _version_objection(self) -> str | None:
        if not self.version:
            return None
        try:
            installed = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        if installed != self.version:
            return f"{self.package} {installed} is installed, {self.version} is known here"
        return None


@functools.cache
def _loaded(peer: Peer) -> Callable:
    return peer.load()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def _results(attention: Attention, inputs: MsDeformAttnInputs) -> list[Tensor]:
    """The results that RESULTS names; the gradient of locations is zero near the edges of cells."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.differentiable()]
    output = attention(*leaves)
    grad_value, grad_locations, grad_weights = torch.autograd.grad(output.float().sum(), leaves)
    inside = inside_a_cell(inputs.sampling_locations, inputs.spatial_shapes)
    return [output, grad_value, torch.where(inside, grad_locations, 0), grad_weights]


def oracle_of(inputs: MsDeformAttnInputs) -> list[Tensor]:
    points = (inputs.sampling_locations.shape[4],) * len(inputs.spatial_shapes)

    def attention(value, locations, weights):
        tables = inputs.spatial_shapes, inputs.level_start_index
        return reference.ms_deform_attn(value, *tables, locations.flatten(3, 4), weights.flatten(3), points)

    return _results(attention, inputs.to(torch.float64))


def yardstick_of(inputs: MsDeformAttnInputs) -> list[Tensor]:
    """The results of grid_sample in float32, which replace the oracle for cases where float64 would take minutes."""
    exact = inputs.to(torch.float32)
    return _results(PEERS["grid_sample"].attention(exact), exact)


def _attribute(module: str, name: str) -> Callable[[], Callable]:
    return lambda: functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _like_deformable_detr(function: Callable, inputs: MsDeformAttnInputs) -> Attention:
    return lambda value, locations, weights: function(
        value, inputs.spatial_shapes, inputs.level_start_index, locations, weights, IM2COL_STEP
    )


def _like_deformops(function: Callable, inputs: MsDeformAttnInputs) -> Attention:
    return lambda value, locations, weights: function(
        value, inputs.spatial_shapes, inputs.level_start_index, locations, weights
    ).flatten(2)


def _like_mmcv(function: Callable, inputs: MsDeformAttnInputs) -> Attention:
    step = torch.tensor(IM2COL_STEP)
    return lambda value, locations, weights: function(
        value, inputs.spatial_shapes, inputs.level_start_index, locations, weights, step
    )


def _like_msda_triton(function: Callable, inputs: MsDeformAttnInputs) -> Attention:
    return lambda value, locations, weights: function(
        value, inputs.spatial_shapes, locations, weights, "zeros", False
    ).flatten(2)


def _like_ours(function: Callable, inputs: MsDeformAttnInputs) -> Attention:
    return lambda value, locations, weights: function(
        value, inputs.spatial_shapes, inputs.level_start_index, locations, weights
    )


def _by_grid_sample(function: Callable, inputs: MsDeformAttnInputs) -> Attention:
    sizes = [tuple(size) for size in inputs.spatial_shapes.tolist()]
    return lambda value, locations, weights: function(value, sizes, locations, weights)


def _hub_kernel() -> Callable:
    """The kernel that transformers loads for use_kernels=True, from the hub or from its local cache."""
    layers = (
        importlib.import_module("kernels").get_kernel("kernels-community/deformable-detr", version=1).layers
    )
    return layers.MultiScaleDeformableAttentionFunction.apply


def _deformable_detr() -> Callable:
    """Deformable-DETR's extension, which has no autograd, in a function as in its ms_deform_attn_func.py."""
    extension = importlib.import_module("MultiScaleDeformableAttention")

    class MSDeformAttnFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
            ctx.im2col_step = im2col_step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)

        @staticmethod
        def backward(ctx, grad_output):
            tensors = (*ctx.saved_tensors, grad_output.contiguous())
            value, locations, weights = extension.ms_deform_attn_backward(*tensors, ctx.im2col_step)
            return value, None, None, locations, weights, None

    return MSDeformAttnFunction.apply


OURS = Peer("vitkern", "vitkern", "", lambda: vitkern.ms_deform_attn, _like_ours)

PEERS = {
    peer.name: peer
    for peer in (
        Peer("grid_sample", "torch", "", lambda: reference.ms_deform_attn_by_grid_sample, _by_grid_sample),
        Peer(
            "grid_sample compiled",
            "torch",
            "",
            lambda: torch.compile(reference.ms_deform_attn_by_grid_sample),
            _by_grid_sample,
        ),
        Peer(
            "Deformable-DETR",
            "MultiScaleDeformableAttention",
            "1.0",
            _deformable_detr,
            _like_deformable_detr,
            devices=("cuda",),
        ),
        Peer(
            "torch-ms-deform-attn",
            "torch-ms-deform-attn",
            "0.1.1",
            _attribute("torch_ms_deform_attn", "ms_deform_attn"),
            _like_deformable_detr,
        ),
        Peer(
            "deformops",
            "deformops",
            "3.0.1",
            _attribute("deformops.registry.msda", "msda"),
            _like_deformops,
            devices=("cuda",),
        ),
        Peer(
            "mmcv",
            "mmcv",
            "2.2.0",
            _attribute("mmcv.ops.multi_scale_deform_attn", "MultiScaleDeformableAttnFunction.apply"),
            _like_mmcv,
            devices=("cuda",),
        ),
        Peer(
            "msda-triton",
            "msda-triton",
            "0.1.1",
            _attribute("msda_triton", "multiscale_deformable_attention"),
            _like_msda_triton,
        ),
        Peer("hub kernel", "kernels", "0.17.2", _hub_kernel, _like_deformable_detr, devices=("cuda",)),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="hub-small", choices=ATTENTION_CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = make_inputs(
            ATTENTION_CASES[arguments.case].with_batch(1),
            locations="uniform",
            dtype=dtype,
            device=arguments.device,
        )
        for peer in PEERS.values():
            print(f"{str(dtype)[6:]:<10}{peer.name:<23}{peer.verdict(inputs)}", flush=True)


if __name__ == "__main__":
    main()
