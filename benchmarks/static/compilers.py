# SPDX-License-Identifier: Apache-2.0
"""Runs nvcc and Triton's compiler; no card is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.static import sass
from benchmarks.static.case import Cuda, Triton

ROOT = Path(__file__).resolve().parents[2]


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvcc_version() -> str:
    return re.search(r"release ([\d.]+)", subprocess.check_output([nvcc(), "--version"], text=True))[1]


def kernels_of(op: str, arch: int, folder: Path) -> dict[str, sass.Kernel]:
    """Every kernel of an op: those in the extension that is built here, if it has this card's, or compiled."""
    built = max(ROOT.glob(f"build/*/CMakeFiles/_C.dir/csrc/{op}/cuda.cu.o"), key=_age, default=None)
    sources = [*(ROOT / "csrc" / op).iterdir(), *(ROOT / "csrc" / "common").iterdir()]
    if built is not None and _age(built) > max(map(_age, sources)) and arch in sass.architectures(built):
        return _without_reserved(sass.read(built, arch), arch)
    return compile_file(ROOT / "csrc" / op / "cuda.cu", arch, folder)


def _age(path: Path) -> float:
    return path.stat().st_mtime


def compile_file(source: Path, arch: int, folder: Path) -> dict[str, sass.Kernel]:
    """Every kernel of a .cu file by its name."""
    cubin = folder / f"sm_{arch}.cubin"
    command = [nvcc(), "-std=c++17", f"-arch=sm_{arch}", "-cubin", f"-I{ROOT / 'csrc'}", f"-I{ROOT}"]
    command += ['-DVITKERN_CUDA_ARCHITECTURES=""', "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for sm_{arch}:\n{done.stderr[-4000:]}")
    return _without_reserved(sass.read(cubin), arch)


def _without_reserved(kernels: dict[str, sass.Kernel], arch: int) -> dict[str, sass.Kernel]:
    """By their names, without the shared memory that the driver reserves in each block, counted from sm_90 on."""
    for kernel in kernels.values():
        kernel.shared -= 1024 if arch >= 90 else 0
    return by_name(kernels)


def by_name(kernels: dict[str, sass.Kernel]) -> dict[str, sass.Kernel]:
    """Kernels by their demangled names, without namespace, return type and parameters, instead of their symbols."""
    names = subprocess.check_output(["c++filt"], input="\n".join(kernels), text=True).splitlines()
    return {_short(name): kernel for name, kernel in zip(names, kernels.values())}


def compile_cuda(sources: list[Cuda], arch: int) -> list[sass.Kernel]:
    """The given instantiations, in one run of nvcc."""
    text = "".join(f'#include "{header}"\n' for header in sorted({s.header for s in sources}))
    text += "".join(
        f"namespace {s.namespace} {{\ntemplate __global__ void {s.name}({s.parameters});\n}}\n"
        for s in sources
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(text)
        kernels = compile_file(file, arch, Path(folder))
    return [kernels[source.name] for source in sources]


def _short(name: str) -> str:
    """void vitkern::f<float, 32, false>(vitkern::Task) -> f<float, 32, false>"""
    return re.sub(r"\([^()]*\)$", "", name).removeprefix("void ").split("::", 1)[-1]


def compile_triton(source: Triton, arch: int) -> sass.Kernel:
    """Compiles a kernel for pointers that are aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, options = source.specialise()
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"enable_fp_fusion": True, **options},
    )
    return read_triton(compiled)


def read_triton(compiled) -> sass.Kernel:
    """Reads the machine code that Triton has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = sass.read(cubin).values()
    kernel.shared = compiled.metadata.shared
    return kernel


def why_no_triton() -> str | None:
    """The reason why Triton kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"triton {version} has another interface for compiling ahead, 3.6 is needed"
    return None
