# SPDX-License-Identifier: Apache-2.0
"""`vitkern check --sanitize`: the same checks under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import torch

from vitkern.check.plan import Request
from vitkern.check.routes import all_routes
from vitkern.commands.errors import CommandError

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # what the sanitizer exits with when it has something to say
ENVIRONMENT = {
    # Each tensor an allocation of its own, or an overrun lands in the pool and is not seen.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUDA_LAUNCH_BLOCKING": "1",
}


def sanitize(request: Request) -> int:
    """Returns what the process is to exit with: 1 if a tool has found something."""
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
    """Kernels take a hundred times as long, so the small cases unless others are named; plain torch is not on trial."""
    own = [route for route in all_routes("cuda") if route.backend != "reference"]
    able = [route.name for route in own if route.reason is None]
    if not able:
        reasons = "; ".join(f"{route.name}: {route.reason}" for route in own)
        raise CommandError(f"--sanitize finds no kernels that run here: {reasons}")
    return replace(
        request,
        device="cuda",
        quick=request.quick or not request.cases,
        backends=request.backends or (() if request.module else able),
    )


def _passes(tool: str, request: Request) -> bool:
    """All checks in one process, so that the tool sees every launch."""
    launcher = ["compute-sanitizer", f"--tool={tool}", "--target-processes=application-only"]
    command = [*launcher, f"--error-exitcode={FOUND}", sys.executable, "-m", "vitkern", "check"]
    print(f"compute-sanitizer --tool={tool}", flush=True)
    status = subprocess.run([*command, *request.words()], env={**os.environ, **ENVIRONMENT}).returncode
    if status:
        finding = "found errors" if status == FOUND else f"ended with {status}"
        print(f"FAILED: {tool} {finding}, see above")
    return status == 0
