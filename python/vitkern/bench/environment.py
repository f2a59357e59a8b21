# SPDX-License-Identifier: Apache-2.0
"""The machine, software and commit of a record: the findings of `vitkern doctor`, and the commit."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import vitkern
from vitkern.commands.doctor import examine

Environment = dict[str, Any]
CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"


def environment() -> Environment:
    return examine() | {"commit": commit(Path(vitkern.__file__).parent), "gpu_clocks": gpu_clocks()}


def commit(package: Path) -> dict[str, Any] | None:
    """{"id", "dirty"} of the checkout that the package lies in, or of the one that pip built it from; else None."""
    tracked = _output("git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py")
    if tracked is not None:
        changed = _output("git", "-C", str(package), "status", "--porcelain", "--untracked-files=no", ":/")
        return {"id": _output("git", "-C", str(package), "rev-parse", "HEAD"), "dirty": bool(changed)}
    try:
        # pip writes it when it installs from a repository (PEP 610).
        origin = importlib.metadata.distribution("vitkern").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    built_from = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return {"id": built_from, "dirty": False} if built_from else None


def gpu_clocks() -> list[str]:
    """A line for each card: its clocks and limits, which a driver may change."""
    answer = _output("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return answer.splitlines() if answer else []


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(environment: Environment, device: str) -> tuple[str, ...]:
    """The facts that must be equal for times to be comparable."""
    if device == "cuda":
        return tuple(f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in environment["cuda"]["devices"])
    cpu = environment["cpu"]
    return (cpu["model"], f"{cpu['logical_cores']} logical cores")


def software(environment: Environment) -> dict[str, str]:
    """Versions that may differ but have to be reported, because the anchors run on them."""
    return {
        "torch": environment["torch"]["version"],
        "threads": str(environment["cpu"].get("threads")),
        "instruction set": str(environment["cpu"].get("chosen")),
    }


def in_words(environment: Environment) -> str:
    """One line for tables and pages."""
    cpu, found = environment["cpu"], commit_in_words(environment)
    gpus = "".join(f", {gpu['name']}" for gpu in environment["cuda"]["devices"])
    kernels = f"{cpu.get('threads')} threads, {cpu.get('chosen')} kernels"
    return f"{cpu['model']}{gpus}, {kernels}, torch {environment['torch']['version']}, vitkern {found}"


def commit_in_words(environment: Environment) -> str:
    found = environment["commit"]
    version = environment["vitkern"]["version"]
    return f"{version} at {found['id'][:10]}{' with changes' if found['dirty'] else ''}" if found else version
