# SPDX-License-Identifier: Apache-2.0
"""The backends: their names, whether one can run, the choice, and its explanation.

Everything follows from ``can_run``: the automatic choice takes the first backend without an objection, a backend that
the user names raises its objection, and ``vitkern doctor`` prints the objections.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings

import torch

from vitkern.ops import native, private

logger = logging.getLogger("vitkern")

# In order of preference. `reference` is plain torch: it runs wherever torch does, and its use is always visible.
BACKENDS = ("cpu", "cuda", "triton", "reference")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def can_run(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if `backend` serves tensors of this device and dtype, else the reason against it."""
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    return _PREDICATES[backend](device, dtype)


def _can_run_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, these are on {device}"


def _can_run_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if native.cuda_module is not native._C:  # emulated, in tests
        return None if device.type == "cpu" else "the emulator takes CPU tensors"
    if native._C.cuda_version is None:
        return _no_cuda()
    if device.type != "cuda":
        return f"it takes CUDA tensors, these are on {device}"
    driver, runtime = native._C.cuda_driver()
    return driver_objection(driver, runtime) or _no_image_for(
        torch.cuda.get_device_capability(device), native._C.cuda_architectures, ptx=driver >= runtime
    )


def _no_cuda() -> str | None:
    """The reason why this build's CUDA kernels run on no card of this machine, or None."""
    if native._C.cuda_version is None:
        return f"this build of vitkern has no CUDA kernels: {native._C.cuda_reason}"
    return driver_objection(*native._C.cuda_driver())


def driver_objection(driver: int, runtime: int) -> str | None:
    """None if a driver serves programs linked to a CUDA runtime; 12020 is version 12.2, a driver of 0 is none.

    Since CUDA 11 every driver of a major version serves each runtime of that version and of earlier ones.
    """
    if driver // 1000 >= runtime // 1000:
        return None
    needs = f"the CUDA kernels need a driver for CUDA {runtime // 1000}.0 or later"
    if driver == 0:
        return f"{needs}, and no NVIDIA driver was found: install one"
    return (
        f"{needs}, the driver here is for CUDA {cuda_version(driver)}: update it, "
        f"or build vitkern with nvcc {driver // 1000}"
    )


def cuda_version(number: int) -> str:
    """The version as text: 12.2 for 12020."""
    return f"{number // 1000}.{number % 1000 // 10}"


LOWEST_CARD = 80  # sm_80 brought the instructions that the CUDA kernels are made of


def _no_image_for(capability: tuple[int, int], architectures: str, *, ptx: bool = True) -> str | None:
    """None if machine code or, with a recent enough driver, PTX of `architectures` runs on a card.

    They are as in "80-real 90 100-real 120". A driver older than nvcc does not compile its PTX.
    """
    major, minor = capability
    card = 10 * major + minor
    if card < LOWEST_CARD:
        return f"the CUDA kernels need a card of sm_{LOWEST_CARD} or later, this one is sm_{card}"
    only_ptx = False
    for architecture in architectures.split():
        name, _, kind = architecture.partition("-")
        number = int(name)
        if number // 10 == major and number <= card and kind != "virtual":
            return None
        only_ptx |= kind != "real" and number <= card
    if only_ptx and ptx:
        return None
    reason = f"its CUDA kernels were compiled for sm {architectures}, this card is sm_{card}"
    if only_ptx:
        return f"{reason} and its driver is older than the nvcc that made their PTX: update the driver"
    return f"{reason}: build vitkern with VITKERN_CUDA_ARCHITECTURES={card}-real"


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


Refusals = tuple[tuple[str, str], ...]  # backends that an op's tensors exceed, and why


@functools.lru_cache(maxsize=4096)
def choose(device: torch.device, dtype: torch.dtype, requested: str | None, refusals: Refusals = ()) -> str:
    """The backend that runs: the requested one (or VITKERN_BACKEND's) or an error; else the first that can.

    `refusals` are those of an op for its tensors: see vitkern.ops.op.Op.
    """
    beyond = dict(refusals)
    named_by = "backend" if requested is not None else "VITKERN_BACKEND"
    requested = requested if requested is not None else os.environ.get("VITKERN_BACKEND") or None
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(f"vitkern: {named_by} must be one of {', '.join(BACKENDS)}, got {requested!r}")
        reason = can_run(requested, device, dtype) or beyond.get(requested)
        if reason is not None:
            raise RuntimeError(f"vitkern: {named_by} {requested!r} cannot run here: {reason}")
        return requested

    objections = {}
    for backend in BACKENDS:
        reason = can_run(backend, device, dtype) or beyond.get(backend)
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


@private.assume_constant_result
def falls_to_reference(
    device: torch.device, dtype: torch.dtype, requested: str | None, refusals: Refusals = ()
) -> bool:
    """Whether the choice is the reference: differentiable torch code, which is no op."""
    if device.type == "meta" or dtype not in DTYPES:
        return False  # an op's own check has the better message
    return choose(device, dtype, requested, refusals) == "reference"


def explain(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """For each backend None, or why it cannot run: on `device`, or by default on the device it is made for."""
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
            # Without a GPU the build's own objection is more useful.
            reasons[backend] = (
                can_run(backend, torch.device("cuda:0"), dtype) if backend == "triton" else _no_cuda()
            )
            reasons[backend] = reasons[backend] or "torch sees no GPU"
    return reasons
