# SPDX-License-Identifier: Apache-2.0
"""`vitkern check --sanitize`: the same checks under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from vitkern.check.plan import Request
from vitkern.check.routes import all_routes
from vitkern.commands.errors import CommandError

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # the exit status of a sanitizer with findings
ENVIRONMENT = {
    # Each tensor has an allocation of its own, or an overrun lands in the pool and is not seen.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUDA_LAUNCH_BLOCKING": "1",
}


def sanitize(request: Request) -> int:
    """Returns the exit status: 1 if a tool has findings."""
    if request.device == "cpu":
        raise CommandError("--sanitize is for kernels on a GPU, so --device has to be cuda")
    if not torch.cuda.is_available():
        raise CommandError(
            "--sanitize needs a GPU, and torch finds no usable one here (see `vitkern doctor`)"
        )
    if shutil.which("compute-sanitizer") is None:
        raise CommandError("--sanitize needs compute-sanitizer of the CUDA toolkit in PATH")
    failed = [tool for tool in TOOLS if not _passes(tool, affordable(request))]
    return int(bool(failed))


def affordable(request: Request) -> Request:
    """The request with small cases and no finite differences by default: a tool slows kernels a hundredfold."""
    small = replace(request, device="cuda", quick=request.quick or not request.cases)
    if request.module is not None:
        return small
    kinds = request.kinds or ("oracle", "repeat")
    return replace(small, kinds=kinds, backends=request.backends or _backends())


def _backends() -> list[str]:
    """The routes that can run, without plain torch."""
    own = [route for route in all_routes("cuda") if route.backend != "reference"]
    able = [route.name for route in own if route.reason is None]
    if not able:
        reasons = "; ".join(f"{route.name}: {route.reason}" for route in own)
        raise CommandError(f"--sanitize finds no kernels that run here: {reasons}")
    return able


def command(tool: str, arguments: Sequence[str]) -> list[str]:
    """`vitkern` with these arguments, so that the tool sees every launch: a user's op has a process of its own."""
    targets = "all" if "--module" in arguments else "application-only"
    launcher = ["compute-sanitizer", f"--tool={tool}", f"--target-processes={targets}"]
    return [*launcher, f"--error-exitcode={FOUND}", sys.executable, "-m", "vitkern", *arguments]


def _passes(tool: str, request: Request) -> bool:
    print(f"compute-sanitizer --tool={tool}", flush=True)
    environment = {**os.environ, **ENVIRONMENT}
    status = subprocess.run(command(tool, ["check", *request.words()]), env=environment).returncode
    if status:
        finding = "found errors" if status == FOUND else f"ended with {status}"
        print(f"FAILED: {tool} {finding}, see above")
    return status == 0
