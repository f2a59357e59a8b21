# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands take. No torch in here: the command line has to work without."""

from __future__ import annotations

import argparse


def add_several(parser: argparse.ArgumentParser, option: str, field: str, says: str) -> None:
    """An option that may be repeated, for that field of a request."""
    parser.add_argument(
        option, dest=field, metavar=option[2:].upper(), action="append", default=[], help=says
    )


def add_filters(
    parser: argparse.ArgumentParser, *, case: str, backend: str, device: str, quick: str, when: str = ""
) -> None:
    """The fields of vitkern.commands.choices.Filters, with what the help says where commands differ."""
    add_several(parser, "--op", "ops", f"{when}only this op; may be repeated, as the next ones")
    add_several(parser, "--case", "cases", f"{when}{case}")
    add_several(parser, "--backend", "backends", f"{when}{backend}")
    add_several(parser, "--dtype", "dtypes", f"{when}fp32, bf16, fp16 or fp64")
    parser.add_argument("--device", choices=["cpu", "cuda"], help=f"{when}{device}")
    parser.add_argument("--quick", action="store_true", help=f"{when}{quick}")
