# SPDX-License-Identifier: Apache-2.0
"""The copy of the checkout under build/mutate, in which files are mutated, built and tested."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.mutating.draw import Project
from tools.mutating.mutation import Mutation

_BUILT = (".o", ".a", ".so")
_QUOTED = "import sysconfig; print(sysconfig.get_path('purelib'))"


class DoesNotCompileError(Exception):
    pass


class Workplace:
    def __init__(self, project: Project, processes: int = 2) -> None:
        self.project, self.root = project, project.root / "build" / "mutate"
        self.tree, self.venv, self.kept = self.root / "tree", self.root / "venv", self.root / "built"
        self.processes = processes  # that run tests at once
        self.python = self.venv / "bin" / "python"
        self._original: tuple[Path, bytes, tuple[int, int]] | None = None
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",  # a change of the same length in the same second would not be seen
            "OMP_WAIT_POLICY": "passive",
        }

    # ---- The copy

    def prepare(self) -> None:
        """Brings the copy up to date, even if a killed run has left a mutation in it."""
        self.tree.mkdir(parents=True, exist_ok=True)
        self._restore_built()
        self._copy_sources()
        if not self.python.exists():
            self._make_venv()
        if self.project.compiled:
            self._build_first()
            self._keep_built()

    def _files(self) -> list[str]:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=self.project.root,
            capture_output=True,
            text=True,
        )
        if listed.returncode == 0 and listed.stdout:
            return [file for file in listed.stdout.splitlines() if (self.project.root / file).is_file()]
        found = (path for path in self.project.root.rglob("*") if path.is_file())
        names = (path.relative_to(self.project.root) for path in found)
        return [str(name) for name in names if name.parts[0] != "build" and "__pycache__" not in name.parts]

    def _copy_sources(self) -> None:
        """Copies changed files with their times, so that only these are built again."""
        files = set(self._files())
        for file in files:
            source, copy = self.project.root / file, self.tree / file
            if not _is_same(source, copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
        for path in list(self.tree.rglob("*")):
            name = path.relative_to(self.tree)
            if path.is_file() and str(name) not in files and name.parts[0] not in ("build", ".hypothesis"):
                path.unlink()

    def _make_venv(self) -> None:
        """Creates an environment that borrows all packages of this one, except the package under test."""
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", self.venv], check=True)
        lent = subprocess.check_output([sys.executable, "-c", _QUOTED], text=True)
        (self.packages() / "borrowed.pth").write_text(lent)
        calls = [Path(__file__).with_name("calls.cpp"), "-o", self.packages() / "_mutate_calls.so"]
        include = f"-I{sysconfig.get_path('include')}"
        subprocess.run(["c++", "-std=c++17", "-O2", "-shared", "-fPIC", include, *calls], check=True)
        shutil.copy(Path(__file__).with_name("reach.py"), self.packages() / "_mutate_reach.py")
        (self.packages() / "_mutate_reach.pth").write_text("import _mutate_reach; _mutate_reach.start()\n")

    def packages(self) -> Path:
        return next((self.venv / "lib").glob("python*")) / "site-packages"

    def text(self, file: str) -> str:
        return (self.tree / file).read_text(encoding="utf-8")

    # ---- Builds

    def _build_first(self) -> None:
        if not (self.packages() / self.project.installs).exists():
            pip = [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "--quiet",
                "--python",
                self.python,
            ]
            options = ["--no-build-isolation", "--no-deps", "--ignore-installed", "--editable", self.tree]
            self._run([*pip, "install", *options], VITKERN_CUDA="OFF")
        for kind in ((), ("--races",)):
            self._run([self.python, "-m", "tests.emulated", *kind])
        self._build()

    def _folders(self) -> list[tuple[Path, str]]:
        """The build folders, and the target of each."""
        module = next((self.tree / "build").glob("cp*"))
        return [(module, "_C"), (self.tree / "build" / "emulator", "_emulated")]

    def _build(self) -> None:
        for folder, target in self._folders():
            self._run(["cmake", "--build", folder, "--target", target, "--parallel", "2"])
        for library in self._folders()[0][0].glob("_C*.so"):
            shutil.copy2(library, self.packages() / self.project.installs / library.name)

    def emulated(self) -> Path:
        return next((self.tree / "build" / "emulator").glob("_emulated*.so"))

    def races(self) -> Path:
        """Builds the emulated kernels with the planted mutation and the race detector."""
        folder = self.tree / "build" / "emulator-races"
        self._run(["cmake", "--build", folder, "--target", "_emulated", "--parallel", "2"])
        return next(folder.glob("_emulated*.so"))

    def _run(self, command: Sequence[str | Path], **variables: str) -> str:
        done = subprocess.run(
            command, cwd=self.tree, env={**self.environment, **variables}, capture_output=True, text=True
        )
        if done.returncode:
            raise DoesNotCompileError((done.stdout + done.stderr)[-4000:])
        return done.stdout

    # ---- Built files: those of the unchanged code are kept, so that a mutation is undone without a build

    def _built(self) -> Iterator[Path]:
        """The paths of all built files, relative to the workplace."""
        folders = [folder for folder in (self.tree / "build").glob("*") if folder.is_dir()]
        for folder in [*folders, self.packages() / self.project.installs]:
            for path in folder.rglob("*"):
                if path.suffix in _BUILT and path.is_file():
                    yield path.relative_to(self.root)

    def _keep_built(self) -> None:
        for name in self._built():
            if not _is_same(self.root / name, self.kept / name):
                (self.kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / name, self.kept / name)

    def _restore_built(self) -> None:
        for kept in self.kept.rglob("*"):
            path = self.root / kept.relative_to(self.kept)
            if kept.is_file() and path.exists() and not _is_same(kept, path):
                path.unlink()  # a process may still have it open
                shutil.copy2(kept, path)

    def _changed(self) -> list[Path]:
        """The objects whose machine code differs from the kept ones; debugging symbols do not count."""
        objects = [name for name in self._built() if name.suffix == ".o" and (self.kept / name).exists()]
        written = [name for name in objects if not _is_same(self.root / name, self.kept / name)]
        return [name for name in written if _code(self.root / name) != _code(self.kept / name)]

    # ---- One mutation

    def plant(self, mutation: Mutation) -> list[Path]:
        """Applies the mutation, builds, and returns the changed objects."""
        path = self.tree / mutation.file
        times = path.stat()
        self._original = path, path.read_bytes(), (times.st_atime_ns, times.st_mtime_ns)
        path.write_text(mutation.applied(self.text(mutation.file)), encoding="utf-8")
        if mutation.file.endswith(".py"):
            return []
        self._build()
        return self._changed()

    def is_planted(self) -> bool:
        return self._original is not None

    def restore(self) -> None:
        assert self._original is not None
        path, content, times = self._original
        path.write_bytes(content)
        os.utime(path, ns=times)
        self._original = None
        self._restore_built()


def _is_same(one: Path, other: Path) -> bool:
    if not other.exists():
        return False
    first, second = one.stat(), other.stat()
    return (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)


def _code(path: Path) -> str:
    with tempfile.NamedTemporaryFile() as stripped:
        subprocess.run(["objcopy", "--strip-debug", path, stripped.name], check=True)
        return hashlib.sha256(Path(stripped.name).read_bytes()).hexdigest()
