# SPDX-License-Identifier: Apache-2.0
"""Shared by the scripts of this folder: their arguments, and the line that describes the machine."""

from __future__ import annotations

import argparse

import torch

from vitkern import _C
from vitkern.commands.doctor import cpu_model


def arguments(description: str, *, seconds: float, compiles: bool = False) -> argparse.Namespace:
    """The arguments of every benchmark; sets torch's threads. `seconds` is the default time limit of a row.

    compiles: whether torch.compile is one of the implementations.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=seconds, help="time limit of a row")
    parser.add_argument("--match", default="", help="only rows whose text contains this")
    if compiles:
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def machine() -> str:
    """A description of the machine, the first line of a table."""
    kernels = f"{torch.get_num_threads()} threads, {_C.cpu_isa()} kernels"
    return f"{cpu_model()}, {kernels}, torch {torch.__version__}"
