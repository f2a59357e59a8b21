# SPDX-License-Identifier: Apache-2.0
"""The choices that a command offers, and the sentences that refuse unknown ones."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from vitkern.commands.arguments import option_of
from vitkern.commands.errors import CommandError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in torch: float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Filters:
    """The choices on the command line; empty ones stand for the default."""

    ops: Sequence[str] = ()
    cases: Sequence[str] = ()  # names, or patterns such as injector-*
    backends: Sequence[str] = ()
    dtypes: Sequence[str] = ()  # keys of DTYPES
    device: str | None = None
    quick: bool = False

    def words(self) -> list[str]:
        """The arguments that make this request."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value, option = getattr(self, field.name), option_of(field.name)
            if value is True:
                words.append(option)
            elif value != field.default:
                values = value if isinstance(value, (list, tuple)) else [value]
                words += [word for each in values for word in (option, str(each))]
        return words


Request = TypeVar("Request", bound=Filters)


def requested(kind: type[Request], arguments: argparse.Namespace) -> Request:
    """A request from the arguments with the names of its fields; missing ones keep the request's defaults."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None})


def chosen(what: str, asked: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """The known names that were requested, in their order."""
    for name in asked:
        if name not in known:
            raise CommandError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def cases_exist(patterns: Iterable[str], known: Iterable[str]) -> None:
    """Refuses a pattern that matches none of `known`, the cases of all requested ops, since each op has other cases."""
    names = sorted(set(known))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise CommandError(f"unknown case {pattern!r}: choose from {', '.join(names)}")


def device_of(name: str | None) -> str:
    """The requested device; by default cuda if there is one."""
    if torch.cuda.is_available():
        return name or "cuda"
    if name == "cuda":
        raise CommandError(
            "torch finds no usable GPU here (`vitkern doctor` says more), so --device has to be cpu"
        )
    return "cpu"
