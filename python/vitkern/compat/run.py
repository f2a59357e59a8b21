# SPDX-License-Identifier: Apache-2.0
"""``vitkern run SCRIPT``: a script as it is, and the processes that it starts, with this package's kernels installed.

Python itself runs the script, so its arguments, paths, exit status and tracebacks are the usual ones. The folder
``startup`` is on PYTHONPATH, and its sitecustomize does the same as ``vitkern.install``, in this process and in those
below: workers of data loaders, torchrun's, and all others that the script starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from vitkern.compat import imports, tao
from vitkern.compat.install import ECOSYSTEMS, switch

STARTUP = Path(__file__).parent / "startup"


def main(command: Sequence[str], *, override: bool) -> int:
    """Replaces this process by Python with this command line."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        print(
            "vitkern run: python -E, -I and -S keep it from preparing the script: leave them out",
            file=sys.stderr,
        )
        return 2
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    options = "install,override" if override else "install"
    environment = {**os.environ, "PYTHONPATH": path, "VITKERN_RUN": options}
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    line = [sys.executable, *flags, *command]
    if os.name != "nt":  # there the shell would not wait
        os.execve(sys.executable, line, environment)
    return subprocess.call(line, env=environment)


def find_switched(package: str, *, override: bool) -> ModuleSpec | None:
    """The spec of a package that is being imported, after vitkern's changes to it are in place."""
    for part in ECOSYSTEMS.values():
        if part.extension.partition(".")[0] == package:
            for left in switch([part], override=override).left:
                if not part.home:
                    print(f"vitkern run: {left}; --override puts vitkern's in its place", file=sys.stderr)
    if package == tao.PACKAGE:
        try:
            tao.install(override=override)
        except RuntimeError as error:
            print(f"vitkern run: {error}", file=sys.stderr)
    return imports.find_spec(package)
