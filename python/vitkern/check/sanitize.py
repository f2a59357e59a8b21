# SPDX-License-Identifier: Apache-2.0
"""`vitkern check --sanitize`: the same checks under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from vitkern.check.errors import CheckError

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # what the sanitizer exits with when it has something to say
ENVIRONMENT = {
    # Each tensor an allocation of its own, or an overrun lands in the pool and is not seen.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUDA_LAUNCH_BLOCKING": "1",
}


def sanitize(arguments: Sequence[str]) -> int:
    """`arguments` of vitkern with --sanitize among them."""
    if not torch.cuda.is_available():
        raise CheckError("--sanitize needs a GPU, and torch finds no usable one here (see `vitkern doctor`)")
    if shutil.which("compute-sanitizer") is None:
        raise CheckError("--sanitize needs compute-sanitizer of the CUDA toolkit in PATH")
    status = 0
    for tool in TOOLS:
        print(f"compute-sanitizer --tool={tool}", flush=True)
        done = subprocess.run(command(tool, arguments), env={**os.environ, **ENVIRONMENT})
        if done.returncode:
            finding = "found errors" if done.returncode == FOUND else f"ended with {done.returncode}"
            print(f"FAILED: {tool} {finding}, see above")
        status = status or int(done.returncode != 0)
    return status


def command(tool: str, arguments: Sequence[str]) -> list[str]:
    same = [word for word in arguments if word != "--sanitize"]
    same += [] if "--device" in " ".join(same) else ["--device", "cuda"]
    launcher = ["compute-sanitizer", f"--tool={tool}", "--target-processes=application-only"]
    return [*launcher, f"--error-exitcode={FOUND}", sys.executable, "-m", "vitkern", *same]
