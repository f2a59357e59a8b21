# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compiled for the CPU (csrc/emulator), built on demand under build/: ``python -m tests.emulated``."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = "address,undefined"


def _reason() -> str | None:
    """The reason why the emulator cannot run here, or None."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the emulator is for Linux on x86-64 and aarch64, not {platform.system()} on {platform.machine()}"
    missing = [tool for tool in ("cmake", "c++") if _tool(tool) is None]
    missing += [name for name in ("pybind11",) if importlib.util.find_spec(name) is None]
    return f"the emulator is built with {' and '.join(missing)}, not found" if missing else None


def _tool(name: str) -> str | None:
    beside_python = Path(sys.executable).parent / name
    return str(beside_python) if beside_python.exists() else shutil.which(name)


def build(sanitize: str = "", watch: str = "") -> Path:
    """Builds the module if the sources have changed, as CMake finds, and returns its file."""
    import pybind11

    kind = f"emulator-{watch}" if watch else "emulator-sanitized" if sanitize else "emulator"
    folder = ROOT / "build" / kind
    defines = {
        "VITKERN_EMULATOR": "ON",
        "VITKERN_CUDA": "OFF",
        "VITKERN_SANITIZE": sanitize,
        "VITKERN_WATCH": watch,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    ninja = _tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    _run(_tool("cmake"), "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in defines.items()))
    _run(_tool("cmake"), "--build", folder, "--target", "_emulated", "--parallel", "2")
    return next(folder.glob(f"_emulated*{importlib.machinery.EXTENSION_SUFFIXES[0]}"))


# As each kind of build compiles the kernels; CMakeLists.txt says why.
_FLAGS = {
    "": ("-O1", "-g"),
    "races": ("-O1", "-g", "-fsanitize=thread"),
    "libtsan": ("-O1", "-g", "-fsanitize=thread"),
    "counts": ("-O0", "-g1", "-fsanitize=thread", "-fsanitize-coverage=trace-pc"),
}


def compile_program(
    name: str | Path, folder: Path, sanitize: str = "", watch: str = "", flags: Sequence[str] = ()
) -> Path:
    """Compiles a file of tests/emulator, or at another path, to an executable, or with -shared to a library.

    `watch`: csrc/emulator/<watch>.cpp watches the emulated kernels.
    """
    program = folder / (Path(name).stem + ("-sanitized" if sanitize else f"-{watch}" if watch else ""))
    flags = [*flags, *([f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else [])]
    flags += [
        "-std=c++17",
        "-fPIC",
        "-fopenmp",
        "-ffp-contract=off",
        "-DVITKERN_EMULATED",
        f"-I{ROOT / 'csrc'}",
    ]
    flags += ["-DVITKERN_WATCHED", "-Wno-unknown-pragmas"] if watch else []
    source = ROOT / "tests" / "emulator" / name
    if not watch:
        _run(_tool("c++"), *flags, *_FLAGS[watch], "-x", "c++", source, "-o", program)
        return program
    # Instrumented alone; linked without libtsan, unless that is what watches.
    objects = program.with_suffix(".kernels.o"), program.with_suffix(".runtime.o")
    _run(_tool("c++"), *flags, *_FLAGS[watch], "-x", "c++", "-c", source, "-o", objects[0])
    _run(_tool("c++"), *flags, "-O2", "-c", ROOT / "csrc" / "emulator" / f"{watch}.cpp", "-o", objects[1])
    runtime = ["-fsanitize=thread"] if watch == "libtsan" else []
    _run(_tool("c++"), *flags, *runtime, *objects, "-ldl", "-o", program)
    return program


def _run(*command) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )


@functools.cache
def _load() -> ModuleType | RuntimeError:
    try:
        path = Path(os.environ.get("VITKERN_EMULATED") or build())
    except RuntimeError as error:
        return error  # kept, so that a build that fails is not tried again by every test
    spec = importlib.util.spec_from_file_location("_emulated", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def module() -> ModuleType:
    """The emulated twin of vitkern._C: its functions ending in _cuda run on CPU tensors."""
    loaded = _load()
    if isinstance(loaded, RuntimeError):
        raise loaded
    return loaded


def sanitizer_environment() -> dict[str, str]:
    """The variables of a Python process that loads a module built with SANITIZERS."""
    libraries = (
        subprocess.check_output(["c++", f"-print-file-name=lib{n}.so"], text=True) for n in ("asan", "ubsan")
    )
    return {
        "VITKERN_EMULATED": str(build(SANITIZERS)),
        "LD_PRELOAD": ":".join(library.strip() for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


REASON = _reason()

if __name__ == "__main__":
    watch = next((word[2:] for word in sys.argv[1:] if word in ("--races", "--libtsan", "--counts")), "")
    print(REASON or build(SANITIZERS if "--sanitize" in sys.argv else "", watch))
