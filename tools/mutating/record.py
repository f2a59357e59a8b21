# SPDX-License-Identifier: Apache-2.0
"""The record of the functions that each test reaches, and the choice of the tests for a mutation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.mutating.mutation import Mutation

# The tests of a compiled object, chosen by names of its build and op. Tests with the runner cpu-wide are left out,
# because they compile all kernels themselves; the same sources run as avx512 or avx2.
_CPU = r"^(?!.*(cpu-wide|cuda-|triton-|reference-|emulated)).*"
_EMULATED = r"^(?!.*(cpu-|triton-|reference-|cuda-gpu)).*"
_OPS = {
    "ms_deform_attn": r"ms_deform_attn|drawn_attention",
    "adapter_bottleneck": r"adapter",
    "token_pool": r"token_pool|_pool",
    "token_project": r"token_project|_project",
}
_KERNELS = {
    "ms_deform_attn": r"test_cpu_kernels|test_cuda_emulated\.py",
    "adapter_bottleneck": r"test_cuda_emulated_gemm",
    "token_pool": r"test_cpu_tokens|test_cuda_emulated_gemm",
    "token_project": r"test_cpu_tokens|test_cuda_emulated_gemm",
}
_CPU_FILES = r"tests/test_(contract|cpu_|ms_deform|adapter|token_|nn_|changed_tensors|large)"
_EMULATED_FILES = r"tests/test_(contract|cuda_emulated|emulator|cuda_launch)"
_HOST = r"tests/test_(architecture|backend_choice|changed_tensors|torch_citizenship|ms_deform|adapter|token|start|nn_)"


def _pattern(built: str) -> str:
    """A pattern for the names of the tests that run an object."""
    for op, words in _OPS.items():
        if f"{op}/cpu.cpp" in built:
            return rf"(?={_CPU_FILES}){_CPU}({words}|{_KERNELS[op]})"
        if f"{op}_cuda" in built:
            return rf"(?={_EMULATED_FILES}){_EMULATED}({words}|{_KERNELS[op]})"
    if "bindings" in built:
        return (
            _HOST if "emulator" not in built else r"tests/test_contract.*cuda-emulated-.*(odd-channels|gelu)"
        )
    return rf"(?={_CPU_FILES}){_CPU}"


def races_of(objects: Sequence[Path]) -> str:
    """The ops whose emulated kernels have changed, as an expression for pytest's -k."""
    return " or ".join(op for op in _OPS if any(f"{op}_cuda" in path.name for path in objects))


class Record:
    """The files that the recording plugin has written, one for each test file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}  # of the tests that pass
        self._reaching: dict[str, list[str]] = {}
        self._importing: dict[str, list[str]] = {}
        self.cut: list[str] = []  # test files whose record is not complete
        for path in sorted(folder.glob("*.json")):
            self._read(json.loads(path.read_text(encoding="utf-8")), path.stem)

    def _read(self, record: dict[str, Any], stem: str) -> None:
        passed = {node: test for node, test in record["tests"].items() if test["outcome"] == "passed"}
        if not record["complete"]:
            self.cut.append(f"tests/{stem}.py")
        for node, test in passed.items():
            self.seconds[node] = test["seconds"]
            for number in test["reaches"]:
                self._reaching.setdefault(record["functions"][number], []).append(node)
        for file in record["imported"]:
            self._importing.setdefault(file, []).extend(passed)

    def has(self, test_file: Path) -> bool:
        """Whether there is a record of the file's current state."""
        path = self.path(test_file.name)
        return path.exists() and path.stat().st_mtime >= test_file.stat().st_mtime

    def path(self, test_file: str) -> Path:
        return self.folder / f"{Path(test_file).stem}.json"

    def tests(self, mutation: Mutation, objects: Sequence[Path] = ()) -> list[str]:
        """The tests for a mutation: quick files first, and in each file the quick tests first."""
        if objects:
            patterns = [re.compile(each) for each in {_pattern(str(path)) for path in objects}]
            return self.in_order(node for node in self.seconds if any(each.match(node) for each in patterns))
        reached = self._reaching.get(f"{mutation.file}:{mutation.function}")
        if mutation.function and not hasattr((lambda: 0).__code__, "co_qualname"):
            reached = self._reaching.get(f"{mutation.file}:{mutation.function.split('.')[-1]}")
        if reached is not None or mutation.function:
            return self.in_order(reached or ())
        own = {
            node
            for name, nodes in self._reaching.items()
            if name.startswith(f"{mutation.file}:")
            for node in nodes
        }
        others = set(self._importing.get(mutation.file, ())) - own
        return [*self.in_order(own), *self.in_order(others)]

    def in_order(self, nodes: Iterable[str]) -> list[str]:
        files: dict[str, list[str]] = {}
        for node in nodes:
            files.setdefault(node.split("::")[0], []).append(node)
        total = {file: sum(self.seconds[node] for node in found) for file, found in files.items()}
        return [
            node
            for file in sorted(files, key=lambda file: (total[file], file))
            for node in sorted(files[file], key=lambda node: (self.seconds[node], node))
        ]
