# SPDX-License-Identifier: Apache-2.0
"""The code of a project: a release from PyPI or a commit from GitHub, unpacked and kept below one folder."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def folder_of(source: str, below: Path) -> Path:
    """The folder of ``name==version`` or ``owner/name@commit``, which is downloaded if it is missing."""
    place = below / source.replace("/", "+")
    if not place.is_dir():
        archive = _release(source, below) if "==" in source else _commit(source, below)
        partial = place.with_suffix(".partial")
        _unpack(archive, partial)
        partial.rename(place)
    return place


def _release(requirement: str, below: Path) -> bytes:
    """The wheel of a release, or its source archive if it has no wheel."""
    downloads = below / "downloads" / requirement
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--dest", str(downloads), requirement]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True, stderr=subprocess.DEVNULL)
    (file,) = downloads.iterdir()
    return file.read_bytes()


def _commit(source: str, below: Path) -> bytes:
    """The Python files of a commit: from a bare clone ``owner+name`` below ``mirrors``, or from GitHub."""
    name, _, commit = source.partition("@")
    mirror = below / "mirrors" / name.replace("/", "+")
    if not mirror.is_dir():
        url = f"https://github.com/{name}"
        subprocess.run(["git", "clone", "--quiet", "--bare", url, str(mirror)], check=True)
    archive = ["git", "-C", str(mirror), "archive", commit, "--", "*.py"]
    return subprocess.run(archive, check=True, capture_output=True).stdout


def _unpack(archive: bytes, place: Path) -> None:
    if zipfile.is_zipfile(io.BytesIO(archive)):
        zipfile.ZipFile(io.BytesIO(archive)).extractall(place)
        return
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(place, filter="data")
    inner = list(place.iterdir())
    if (
        len(inner) == 1 and inner[0].is_dir() and (inner[0] / "setup.py").is_file()
    ):  # name-version/ of an sdist
        for each in inner[0].iterdir():
            each.rename(place / each.name)
