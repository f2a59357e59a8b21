# SPDX-License-Identifier: Apache-2.0
"""Runs work so that no setting of the caller affects it, and without side effects."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from vitkern.compat.trial.specimen import UnfitError

_T = TypeVar("_T")


def in_a_thread(work: Callable[[], _T]) -> _T:
    """Returns the result of work in its own thread, which no mode, tracer or autocast of the caller affects."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def target() -> None:
        default, threads, collects = torch.get_default_dtype(), torch.get_num_threads(), gc.isenabled()
        try:
            gc.disable()  # Python calls the user's gc.callbacks in the middle of any code, as if that code did
            torch.set_num_threads(1)  # the threads of small operations would wait for one another
            if default != torch.float32:
                torch.set_default_dtype(torch.float32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(work())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)
        finally:
            if collects:
                gc.enable()
            torch.set_num_threads(threads)
            if default != torch.float32:
                torch.set_default_dtype(default)

    thread = threading.Thread(target=target, name="vitkern trial", daemon=True)
    thread.start()
    thread.join()
    if errors:
        if isinstance(errors[0], Exception):
            raise errors[0]
        raise UnfitError(f"its forward raises in a trial: {said(errors[0])}")  # for example SystemExit
    return results[0]


def said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
