# SPDX-License-Identifier: Apache-2.0
"""Places that a command will write to, proved before it measures: an hour must not be lost to a wrong path."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vitkern.commands.errors import CommandError


def prove_file(path: Path | None) -> None:
    """None: nothing will be written."""
    if path is None:
        return
    if path.is_dir():  # an empty name is one, too
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
    """Makes the folder, and a file there that is gone at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(f"cannot write {what}: {error}") from None
