# SPDX-License-Identifier: Apache-2.0
"""Checks of the paths that a command will write to, before it measures: a wrong path must not cost an hour."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vitkern.commands.errors import CommandError


def prove_file(path: Path | None) -> None:
    """Checks that a file can be written; None means that nothing will be written."""
    if path is None:
        return
    if path.is_dir():  # the empty name is a folder too
        raise CommandError(f"cannot write {path}: it is a folder")
    _prove(path, path.parent)
    if path.exists():
        try:
            path.open("ab").close()
        except OSError as error:
            raise CommandError(f"cannot write {path}: {error}") from None


def prove_folder(path: Path) -> None:
    _prove(path, path)


def _prove(what: Path, folder: Path) -> None:
    """Makes the folder, and a file there that is removed at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(f"cannot write {what}: {error}") from None
