# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels with the widest vectors (16 floats), compiled for any chip, so that tests need no AVX-512.

The module is built on demand with VITKERN_VECTOR_BYTES=64 and without OpenMP.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
OPS = ("ms_deform_attn", "adapter_bottleneck", "token_pool", "token_project")
SOURCES = [ROOT / "csrc" / "bindings.cpp", *(ROOT / "csrc" / op / "cpu.cpp" for op in OPS)]
SOURCES += [ROOT / "csrc" / "common" / f"{name}.cpp" for name in ("cpu_isa", "parallel", "scratch")]
COMPILER = shutil.which("c++") if os.name == "posix" else None


def _reason() -> str | None:
    """The reason why the module cannot be built here, or None."""
    if COMPILER is None:
        return "needs a compiler called c++"
    return None if importlib.util.find_spec("pybind11") else "needs pybind11"


def run(*command) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}"
    return done.stdout


@functools.cache
def module() -> ModuleType:
    """The counterpart of vitkern._C with these kernels, built once for each state of the sources."""
    import pybind11

    texts = b"".join(file.read_bytes() for file in sorted((ROOT / "csrc").rglob("*.[ch]*")))
    library = ROOT / "build" / "wide" / f"_wide-{hashlib.sha256(texts).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        defines = [f'-DVITKERN_{name}=""' for name in ("VERSION", "COMPILER", "CUDA_REASON")]
        defines += ["-DVITKERN_MODULE=_wide", "-DVITKERN_ISA=isa_baseline", "-DVITKERN_VECTOR_BYTES=64"]
        includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-fvisibility=hidden"]
        if sys.platform == "darwin":
            flags += ["-undefined", "dynamic_lookup"]  # Python's symbols, as every extension module there
        unfinished = library.with_suffix(f".{os.getpid()}")
        run(COMPILER, *flags, *defines, *includes, *SOURCES, "-o", unfinished)
        unfinished.rename(library)
    spec = importlib.util.spec_from_file_location("_wide", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


REASON = _reason()
