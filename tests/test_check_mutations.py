# SPDX-License-Identifier: Apache-2.0
"""With a flipped sign in a copy of each backward kernel, `vitkern check` fails and names op, backend and gradient.

The copies of a backend's kernels are compiled and checked together. test_judge.py tests the comparison of results.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import emulated, wide
from vitkern import triton_kernels
from vitkern.cases.ops import OPS
from vitkern.cli import main
from vitkern.ops import op

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    op: str
    file: str  # under csrc/ or triton_kernels/
    right: str
    wrong: str
    gradients: tuple[str, ...]  # that must be named; of token_pool's delta, weight's is free by its eq. (9)
    case: str = "odd-channels"


CUDA = (
    Mutation(
        "ms_deform_attn",
        "ms_deform_attn/backward.cuh",
        "along_y += y.slope[r] * sample",
        "along_y -= y.slope[r] * sample",
        ("locations",),
    ),
    Mutation(
        "ms_deform_attn",
        "ms_deform_attn/backward.cuh",
        "part[j] = corners.share[c] * grad[j]",
        "part[j] = -corners.share[c] * grad[j]",
        ("value",),
    ),
    Mutation(
        "ms_deform_attn_fused",
        "ms_deform_attn/backward.cuh",
        "* (gradient - sum)",
        "* (gradient + sum)",
        ("logits",),
    ),
    Mutation(
        "adapter_bottleneck",
        "adapter_bottleneck/backward.cuh",
        "const A a = activate(p.activation, at) * d[i];",
        "const A a = -activate(p.activation, at) * d[i];",
        ("up_weight", "scale"),
        "gelu",
    ),
    Mutation(
        "token_pool",
        "token_pool/backward.cuh",
        "- shared.delta[token]",
        "+ shared.delta[token]",
        ("x",),
    ),
    Mutation(
        "token_project", "token_project/backward.cuh", "(h[t] - mean)", "(h[t] + mean)", ("query", "key")
    ),
)
CPU = (
    Mutation(
        "ms_deform_attn",
        "ms_deform_attn/cpu_scatter.h",
        "top * (dot[1] - dot[0])",
        "top * (dot[1] + dot[0])",
        ("locations",),
    ),
    Mutation(
        "ms_deform_attn_fused",
        "ms_deform_attn/cpu_fused.h",
        "(load<Acc, N>(grads + i) - load<Acc, N>(fusion.scale + i))",
        "(load<Acc, N>(grads + i) + load<Acc, N>(fusion.scale + i))",
        ("logits",),
    ),
    Mutation(
        "adapter_bottleneck",
        "adapter_bottleneck/cpu_backward.h",
        "store(chunk.activated + row * stride + h, a);",
        "store(chunk.activated + row * stride + h, zero - a);",
        ("up_weight",),
        "gelu",
    ),
    Mutation(
        "token_pool",
        "token_pool/cpu_backward.h",
        "load<Acc, N>(dots + token) - load<Acc, N>(worker.delta + token)",
        "load<Acc, N>(dots + token) + load<Acc, N>(worker.delta + token)",
        ("x",),
    ),
    Mutation(
        "token_project",
        "token_project/cpu_backward.h",
        "(load<Acc, N>(shares + token) - mean)",
        "(load<Acc, N>(shares + token) + mean)",
        ("query", "key"),
    ),
)
TRITON = (
    Mutation(
        "ms_deform_attn",
        "ms_deform_attn.py",
        "column_share, column_slope = 1 - right, -1.0",
        "column_share, column_slope = 1 - right, 1.0",
        ("locations",),
    ),
    Mutation(
        "ms_deform_attn_fused",
        "ms_deform_attn_fused.py",
        "(grad_weights - tl.sum",
        "(grad_weights + tl.sum",
        ("logits",),
    ),
    Mutation(
        "adapter_bottleneck",
        "adapter_bottleneck_backward.py",
        "share * (1 + z * (1 - share))",
        "share * (1 - z * (1 - share))",
        ("x", "down_weight", "down_bias"),
        "silu",
    ),
    Mutation("token_pool", "token_pool.py", "(dots - delta[:, None])", "(dots + delta[:, None])", ("x",)),
    Mutation("token_project", "token_project.py", "(h - tl.sum", "(h + tl.sum", ("query", "key")),
)


def several(mutations: Mutation | Sequence[Mutation]) -> Sequence[Mutation]:
    return [mutations] if isinstance(mutations, Mutation) else mutations


def planted(mutations: Sequence[Mutation], source: Path, copy: Path) -> None:
    shutil.copytree(source, copy)
    for mutation in mutations:
        file = copy / mutation.file
        text = file.read_text()
        assert text.count(mutation.right) >= 1, f"{mutation.file} has changed: no {mutation.right}"
        file.write_text(text.replace(mutation.right, mutation.wrong))


# In one process, libraries with the same symbols would share C++'s static objects, so a mutant gets its own process.
# Arguments: a module with a function main, the library, and the arguments of main.
WITH_KERNELS = """
import importlib.util, sys
from vitkern.ops import native
main = importlib.import_module(sys.argv.pop(1)).main
spec = importlib.util.spec_from_file_location("_mutant", sys.argv.pop(1))
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
native._C = native.cuda_module = library
sys.exit(main(sys.argv[1:]))
"""


def arguments_of(backend: str) -> list[str]:
    arguments = ["--backend", backend, "--dtype", "fp32", "--case", "odd-channels"]
    return ["check", *arguments, "--case", "gelu", "--case", "silu", "--kind", "oracle", "--device", "cpu"]


def assert_named(mutations: Sequence[Mutation], backend: str, status: int, said: str) -> None:
    assert status == 1, said
    for mutation in mutations:
        where = f"FAILED {mutation.op} on {backend} in fp32, oracle of case {mutation.case}: "
        for name in mutation.gradients:
            assert f"{where}gradient of {name} " in said, said
    assert {mutation.op for mutation in mutations} == set(OPS)
    assert ": output " not in said


def assert_found_apart(
    mutations: Sequence[Mutation], backend: str, *interpreter: object, **environment: str
) -> None:
    command = [sys.executable, *map(str, interpreter), *arguments_of(backend)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert_named(mutations, backend, done.returncode, done.stdout + done.stderr)


def compile_object(folder: Path, csrc: Path, op: str, file: str, *defines: str) -> Path:
    """Compiles csrc/<op>/<file> without optimisation, to save time."""
    target = folder / f"{op}.o"
    flags = ["-std=c++17", "-O0", "-fPIC", "-pthread", "-fopenmp", "-Wno-psabi", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{csrc}", "-x", "c++"]
    source = csrc / op / file
    wide.run("c++", *flags, *defines, "-c", source, "-o", target)
    return target


def stems(mutations: Sequence[Mutation]) -> list[str]:
    """The folders of csrc/ to compile: one for each mutated op, also if the mutation is in shared code."""
    return sorted({mutation.op.removesuffix("_fused") for mutation in mutations})


def emulated_mutant(mutations: Mutation | Sequence[Mutation], tmp_path: Path) -> Path:
    """Compiles the objects of the mutated ops and links them with the unchanged objects of the others."""
    objects = Path(emulated.module().__file__).parent / "CMakeFiles" / "_emulated.dir"
    if not objects.is_dir():
        pytest.skip("the emulated kernels were built elsewhere, without their objects")
    mutations = several(mutations)
    planted(mutations, ROOT / "csrc", tmp_path / "csrc")
    defines = ("-DVITKERN_EMULATED", "-DVITKERN_WITH_CUDA")
    names = stems(mutations)
    fresh = [compile_object(tmp_path, tmp_path / "csrc", stem, "cuda.cu", *defines) for stem in names]
    replaced = tuple(f"csrc_{stem}_cuda" for stem in names)
    others = [file for file in objects.rglob("*.o") if not file.name.startswith(replaced)]
    library = tmp_path / "_emulated.so"
    wide.run("c++", "-shared", "-fopenmp", *fresh, *others, "-o", library)
    return library


@pytest.mark.skipif(emulated.REASON is not None, reason=str(emulated.REASON))
def test_emulated_cuda(tmp_path):
    library = emulated_mutant(CUDA, tmp_path)
    assert_found_apart(CUDA, "cuda-emulated", "-m", "vitkern", VITKERN_EMULATED=str(library))


@pytest.fixture(scope="module")
def cpu_objects(tmp_path_factory) -> Path:
    """The shared objects of all CPU mutants: the bindings, and each op without a change, compiled on demand."""
    import pybind11

    folder = tmp_path_factory.mktemp("cpu")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-std=c++17", "-O0", "-fPIC", "-pthread", "-Wno-psabi", "-fvisibility=hidden"]
    defines = [f'-DVITKERN_{name}=""' for name in ("VERSION", "COMPILER", "CUDA_REASON")]
    defines += ["-DVITKERN_MODULE=_mutant", "-DVITKERN_ISA=isa_baseline"]
    sources = [source for source in wide.SOURCES if source.name != "cpu.cpp"]
    for source in sources:
        wide.run("c++", *flags, *defines, *includes, "-c", source, "-o", folder / f"{source.stem}.o")
    return folder


def cpu_mutant(mutations: Mutation | Sequence[Mutation], cpu_objects: Path, tmp_path: Path) -> Path:
    mutations = several(mutations)
    planted(mutations, ROOT / "csrc", tmp_path / "csrc")
    objects = [file for file in cpu_objects.glob("*.o") if file.stem not in wide.OPS]
    for stem in wide.OPS:
        folder, csrc = (
            (tmp_path, tmp_path / "csrc") if stem in stems(mutations) else (cpu_objects, ROOT / "csrc")
        )
        if not (folder / f"{stem}.o").exists():
            compile_object(folder, csrc, stem, "cpu.cpp", "-DVITKERN_ISA=isa_baseline")
        objects.append(folder / f"{stem}.o")
    library = tmp_path / "_mutant.so"
    wide.run("c++", "-shared", "-pthread", *objects, "-o", library)
    return library


@pytest.mark.skipif(wide.REASON is not None or sys.platform != "linux", reason=wide.REASON or "for Linux")
def test_cpu(cpu_objects, tmp_path):
    library = cpu_mutant(CPU, cpu_objects, tmp_path)
    assert_found_apart(CPU, "cpu-baseline", "-c", WITH_KERNELS, "vitkern.cli", library)


def plant_in_triton(
    mutations: Mutation | Sequence[Mutation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutations = several(mutations)
    package = f"mutant_{'_'.join(mutation.op for mutation in mutations)}"
    planted(mutations, Path(triton_kernels.__file__).parent, tmp_path / package)
    for file in (tmp_path / package).glob("*.py"):
        file.write_text(file.read_text().replace("vitkern.triton_kernels", package))
    monkeypatch.syspath_prepend(tmp_path)
    for file in (tmp_path / package).glob("[a-z]*.py"):
        importlib.import_module(f"vitkern.triton_kernels.{file.stem}")
        monkeypatch.setattr(triton_kernels, file.stem, importlib.import_module(f"{package}.{file.stem}"))
    op.forget_plans()


def test_interpreted_triton(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    plant_in_triton(TRITON, tmp_path, monkeypatch)
    status = main(arguments_of("triton-interpreted"))
    assert_named(TRITON, "triton-interpreted", status, capsys.readouterr().out)
