# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands take. Torch is not imported here: the command line has to work without it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

from vitkern.commands.errors import CommandError

# Options that may be repeated, and the fields of a request that collect them; all others have the name of their field.
REPEATED = {
    "ops": "--op",
    "cases": "--case",
    "backends": "--backend",
    "dtypes": "--dtype",
    "passes": "--pass",
    "kinds": "--kind",
}


# Values that some of them take, known without torch so that a typo is reported at once; a test checks them.
NAMES = {
    "ops": ("ms_deform_attn", "ms_deform_attn_fused", "adapter_bottleneck", "token_pool", "token_project"),
    "dtypes": ("fp32", "bf16", "fp16", "fp64"),
    "passes": ("forward", "backward", "both"),
    "kinds": ("oracle", "gradcheck", "repeat", "subset"),
}


def names_exist(arguments: argparse.Namespace) -> None:
    for field, known in NAMES.items():
        what = REPEATED[field].removeprefix("--")
        for name in getattr(arguments, field, ()):
            if name not in known:
                raise CommandError(f"unknown {what} {name!r}: choose from {', '.join(known)}")


def option_of(field: str) -> str:
    return REPEATED.get(field, f"--{field}")


def add_repeated(parser: argparse.ArgumentParser, field: str, says: str) -> None:
    name = REPEATED[field].removeprefix("--").upper()
    parser.add_argument(REPEATED[field], dest=field, metavar=name, action="append", default=[], help=says)


def add_filters(
    parser: argparse.ArgumentParser, *, case: str, backend: str, device: str, quick: str, when: str = ""
) -> None:
    """Adds the fields of vitkern.commands.choices.Filters, with the parts of the help that differ between commands."""
    add_repeated(parser, "ops", f"{when}only this op; may be repeated, like --case, --backend and --dtype")
    add_repeated(parser, "cases", f"{when}{case}")
    add_repeated(parser, "backends", f"{when}{backend}")
    add_repeated(parser, "dtypes", f"{when}fp32, bf16, fp16 or fp64")
    parser.add_argument("--device", choices=["cpu", "cuda"], help=f"{when}{device}")
    parser.add_argument("--quick", action="store_true", help=f"{when}{quick}")


def positive(option: str, value: float | None) -> None:
    """Refuses a value that is not positive and finite; None means that it was not given."""
    if value is not None and not 0 < value < math.inf:
        raise CommandError(f"{option} must be more than 0, got {value:g}")


def refuse(arguments: argparse.Namespace, fields: Iterable[str], why: str) -> None:
    """Refuses arguments that would have no effect, instead of silently ignoring them."""
    for field in fields:
        value = getattr(arguments, field)
        if value or (value == 0 and value is not False):  # 0 was given, False was not
            raise CommandError(f"{option_of(field)} {why}")
