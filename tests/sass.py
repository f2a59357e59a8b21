# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA kernels, read without a GPU: resources from ptxas, widths from PTX, loops from SASS."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "ms_deform_attn" / "cuda.cu"
TYPES = {"f": "fp32", "d": "fp64", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
NAME = re.compile(r"\d+(ms_deform_attn_\w+?)I(f|d|6__half|13__nv_bfloat16)(?:Li(\d+)E)?(?:Lb([01])E)?E")


@dataclass
class Kernel:
    name: str  # ms_deform_attn_forward
    dtype: str
    channels: int  # 0: any number
    fused: bool
    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes, without those that the launch asks for
    ptx: str = ""
    sass: list[tuple[int, str]] = field(default_factory=list)  # (address, instruction)

    def loops(self) -> list[list[str]]:
        """The bodies of all loops, one for each jump backwards."""
        bodies = []
        for address, text in self.sass:
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                bodies.append([t for a, t in self.sass if int(target[1], 16) <= a <= address])
        return bodies


def nvcc() -> str | None:
    return shutil.which("nvcc")


def disassembler() -> str | None:
    """cuobjdump of a toolkit, or the one that Triton's package carries."""
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(carried) if carried and carried.exists() else None)


def compile_kernels(arch: int, folder: Path) -> list[Kernel]:
    """Every kernel of ms_deform_attn for sm_<arch>."""
    command = [
        nvcc(),
        "-std=c++17",
        f"-arch=sm_{arch}",
        "-cubin",
        "--keep",
        f"--keep-dir={folder}",
        "-Xptxas=-v",
    ]
    command += [
        f"-I{ROOT / 'csrc'}",
        '-DVITKERN_CUDA_ARCHITECTURES=""',
        "-o",
        str(folder / "kernels.cubin"),
        str(SOURCE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    kernels = {}
    for entry in re.split(r"Compiling entry function", done.stderr)[1:]:
        mangled = re.match(r" '(\w+)'", entry)[1]
        name, dtype, channels, fused = NAME.search(mangled).groups()
        kernel = kernels[mangled] = Kernel(name, TYPES[dtype], int(channels or 0), fused == "1")
        kernel.registers = int(re.search(r"Used (\d+) registers", entry)[1])
        kernel.spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", entry))
        kernel.shared = int((re.search(r"(\d+) bytes smem", entry) or [0, 0])[1])
    for entry in re.split(r"\.entry ", (folder / "cuda.ptx").read_text())[1:]:
        kernels[re.match(r"\w+", entry)[0]].ptx = entry
    if disassembler():
        _read_sass(
            kernels, subprocess.check_output([disassembler(), "-sass", folder / "kernels.cubin"], text=True)
        )
    return list(kernels.values())


def _read_sass(kernels: dict[str, Kernel], text: str) -> None:
    for entry in re.split(r"Function : ", text)[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", entry, re.M)
        kernels[re.match(r"\w+", entry)[0]].sass = [(int(address, 16), line) for address, line in lines]
