# SPDX-License-Identifier: Apache-2.0
"""The mutations of a seed. Groups of files, files, rules and places are drawn in turn, none twice."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.mutating import cpp_sites, python_sites
from tools.mutating.mutation import Mutation


@dataclass(frozen=True)
class Project:
    """The code to mutate, in groups that are drawn equally often, and the tests."""

    root: Path
    groups: dict[str, tuple[str, ...]]  # patterns of files
    left_out: dict[str, str] = field(default_factory=dict)  # test files that do not count, with the reason
    compiled: bool = False  # whether there are files in C++ to build
    installs: str = ""  # the name of the installed package

    def files(self, group: str) -> list[str]:
        found = {path for pattern in self.groups[group] for path in self.root.glob(pattern)}
        return sorted(str(path.relative_to(self.root)) for path in found)

    def text(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8")

    def tests(self) -> list[str]:
        files = sorted(str(path.relative_to(self.root)) for path in self.root.glob("tests/test_*.py"))
        return [file for file in files if file not in self.left_out]


@functools.cache
def sites(file: str, text: str) -> list[Mutation]:
    return (python_sites if file.endswith(".py") else cpp_sites).sites(file, text)


def _of_group(project: Project, group: str, rng: random.Random) -> Iterator[Mutation]:
    """The mutations of a group: all files take turns."""
    texts = {file: project.text(file) for file in project.files(group)}
    left = {file: found for file, text in texts.items() if (found := sites(file, text))}
    while left:
        for file in rng.sample(sorted(left), len(left)):
            rules = sorted({mutation.rule for mutation in left[file]})
            rule = rng.choice(rules)
            mutation = rng.choice([each for each in left[file] if each.rule == rule])
            yield mutation
            # No second mutation of the same line.
            left[file] = [each for each in left[file] if each.line != mutation.line]
        left = {file: found for file, found in left.items() if found}


def draw(project: Project, seed: int, count: int) -> list[Mutation]:
    """The first mutations of a seed: the same for the same files."""
    groups = {group: _of_group(project, group, random.Random(f"{seed} {group}")) for group in project.groups}
    order, drawn = random.Random(seed), []
    while len(drawn) < count and groups:
        for group in order.sample(sorted(groups), len(groups)):
            mutation = next(groups[group], None)
            if mutation is None:
                del groups[group]
            else:
                drawn.append(mutation)
    return drawn[:count]


_OPS = "python/vitkern/ops"
_CHECKS = ("checks", "ms_deform_attn_checks", "levels")
_DISPATCH = ("op", "backends", "plan", "fast_path", "native", "autocast", "private", "flops", "plain")
_FORMULAS = ("adapter_bottleneck", "ms_deform_attn", "token_pool", "token_project", "derivative", "triton_*")
VITKERN = Project(
    root=Path(__file__).resolve().parents[2],
    groups={
        "cuda": ("csrc/*/cuda.cu", "csrc/*/[!t]*.cuh", "csrc/common/tile*.cuh"),
        "cpu": ("csrc/*/cpu*.h", "csrc/*/cpu*.cpp", "csrc/common/[epst]*.h", "csrc/common/[ps]*.cpp"),
        "triton": ("triton_kernels/*.py",),
        "formulas": ("python/vitkern/reference.py", *(f"{_OPS}/{name}.py" for name in _FORMULAS)),
        "dispatch": (
            "python/vitkern/functional.py",
            "csrc/host/*.h",
            *(f"{_OPS}/{name}.py" for name in _DISPATCH),
        ),
        "checks": ("python/vitkern/check/*.py", *(f"{_OPS}/{name}.py" for name in _CHECKS)),
        "compat": ("python/vitkern/compat/*.py", "python/vitkern/compat/trial/*.py"),
        "models": ("python/vitkern/models/*.py", "python/vitkern/nn/*.py"),
    },
    left_out={
        "tests/test_check_mutations.py": "plants faults itself",
        "tests/test_fuzz_mutants.py": "plants faults itself",
        "tests/test_mutate.py": "is the test of this command",
        "tests/test_prose.py": "reads text",
        "tests/test_docs_site.py": "reads text",
        "tests/test_workflows.py": "reads text",
        "tests/test_readme.py": "reads text",
        "tests/test_install.py": "builds the package",
        "tests/test_cuda_build.py": "builds the package",
    },
    compiled=True,
    installs="vitkern",
)
