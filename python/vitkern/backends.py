# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: names, one predicate, the choice, and the explanation.

``can_run`` is asked for everything: the automatic choice takes the first backend without an objection, a backend that
the user named but that has one raises it, and ``vitkern doctor`` prints it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings

import torch

from vitkern.ops import native

logger = logging.getLogger("vitkern")

# In order of preference. `reference` is plain torch: it runs wherever torch does, and never goes unnoticed.
BACKENDS = ("cpu", "cuda", "triton", "reference")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def can_run(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where `backend` serves tensors of this device and dtype, else the reason why it does not."""
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    return _PREDICATES[backend](device, dtype)


def _can_run_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, these are on {device}"


def _can_run_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if native.cuda_module is not native._C:  # emulated, in tests
        return None if device.type == "cpu" else "the emulator takes CPU tensors"
    if native._C.cuda_version is None:
        return f"this build of vitkern has no CUDA kernels: {native._C.cuda_reason}"
    if device.type != "cuda":
        return f"it takes CUDA tensors, these are on {device}"
    return _no_image_for(torch.cuda.get_device_capability(device), native._C.cuda_architectures)


def _no_image_for(capability: tuple[int, int], architectures: str) -> str | None:
    """None if machine code or PTX among `architectures` ("80-real 90-real 120") runs on a card of this capability."""
    major, minor = capability
    card = 10 * major + minor
    for architecture in architectures.split():
        name, _, kind = architecture.partition("-")
        number = int(name)
        same_family = number // 10 == major and number <= card and kind != "virtual"
        by_ptx = kind != "real" and number <= card
        if same_family or by_ptx:
            return None
    return f"its CUDA kernels were compiled for sm {architectures}, this card is sm_{card}"


def _can_run_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return (
            None
            if interpreted
            else "it takes CUDA tensors, these are on cpu (TRITON_INTERPRET=1 interprets them)"
        )
    return None if device.type == "cuda" else f"it takes CUDA tensors, these are on {device}"


def _can_run_reference(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


_PREDICATES = {
    "cpu": _can_run_cpu,
    "cuda": _can_run_cuda,
    "triton": _can_run_triton,
    "reference": _can_run_reference,
}


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, requested: str | None) -> str:
    """The backend that runs: the requested one (or VITKERN_BACKEND's) or an error; else the first that can."""
    named_by = "backend" if requested is not None else "VITKERN_BACKEND"
    requested = requested if requested is not None else os.environ.get("VITKERN_BACKEND") or None
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(f"vitkern: {named_by} must be one of {', '.join(BACKENDS)}, got {requested!r}")
        reason = can_run(requested, device, dtype)
        if reason is not None:
            raise RuntimeError(f"vitkern: {named_by} {requested!r} cannot run here: {reason}")
        return requested

    objections = {}
    for backend in BACKENDS:
        reason = can_run(backend, device, dtype)
        if reason is None:
            break
        objections[backend] = reason
        logger.debug("backend %s passed over for %s on %s: %s", backend, dtype, device, reason)
    if backend == "reference":
        listed = "; ".join(f"{name}: {reason}" for name, reason in objections.items())
        warnings.warn(
            f"vitkern: no kernel for {dtype} on {device}, plain torch runs instead ({listed})", stacklevel=3
        )
    return backend


@torch.compiler.assume_constant_result
def falls_to_reference(device: torch.device, dtype: torch.dtype, requested: str | None) -> bool:
    """Whether the choice is the reference, which is no op but differentiable torch code."""
    if device.type == "meta" or dtype not in DTYPES:
        return False  # an op's own check has the better message
    return choose(device, dtype, requested) == "reference"


def explain(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """For each backend None, or the reason why it cannot run; each on the device it is made for unless one is given."""
    if device is not None:
        return {backend: can_run(backend, torch.device(device), dtype) for backend in BACKENDS}
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    reasons: dict[str, str | None] = {}
    for backend in BACKENDS:
        if backend in ("cpu", "reference"):
            reasons[backend] = can_run(backend, torch.device("cpu"), dtype)
        elif gpu is not None:
            reasons[backend] = can_run(backend, gpu, dtype)
        else:
            # Without a GPU the build's own objection is the more useful one.
            reasons[backend] = (
                can_run(backend, torch.device("cuda:0"), dtype) if backend == "triton" else _no_cuda()
            )
            reasons[backend] = reasons[backend] or "torch sees no GPU"
    return reasons


def _no_cuda() -> str | None:
    return (
        None
        if native._C.cuda_version
        else f"this build of vitkern has no CUDA kernels: {native._C.cuda_reason}"
    )
