# SPDX-License-Identifier: Apache-2.0
"""`vitkern run`: a script runs as under plain Python, except that it and its child processes import the kernels."""

import os
import subprocess
import sys
from textwrap import dedent

import pytest

from tests.test_install import MMCV_LITE, REAL
from vitkern.compat import run, tao
from vitkern.compat.install import ECOSYSTEMS

EXTENSION = "MultiScaleDeformableAttention"
WHAT_IT_SEES = """
    import sys
    print(sys.argv, sys.path, sys.flags.optimize, __name__, __file__, __spec__ and __spec__.name)
    print("torch" in sys.modules)
    def fail():
        {end}
    fail()
"""
CHILDREN = """
    import multiprocessing, subprocess, sys

    def whose(_):
        import MultiScaleDeformableAttention
        return MultiScaleDeformableAttention.ms_deform_attn_forward.__module__

    if __name__ == "__main__":
        print(*multiprocessing.get_context("spawn").Pool(1).map(whose, [0]), whose(0))
        code = "import MultiScaleDeformableAttention as M; print(M.ms_deform_attn_backward.__module__)"
        subprocess.run([sys.executable, "-c", code], check=True)
"""


def python(*arguments, at, flags=(), **environment):
    return subprocess.run(
        [sys.executable, *flags, *arguments],
        capture_output=True,
        text=True,
        cwd=at,
        env={**os.environ, **environment},
        timeout=300,
    )


def vitkern_run(*arguments, **options):
    return python("-m", "vitkern", "run", *arguments, **options)


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return tmp_path

    return to


@pytest.mark.parametrize(
    "command",
    [("script.py", "--override", "-m", "x"), ("-m", "package.tool", "-h")],
    ids=["script", "module"],
)
@pytest.mark.parametrize("end", ["raise SystemExit(7)", "1 / 0"])
def test_a_script_sees_what_python_shows_it(command, end, write):
    """Arguments, paths, names, flags, output, traceback and exit status are the same, and torch is not imported."""
    for name in ("script.py", "package/__init__.py", "package/tool.py"):
        at = write(name, "" if "init" in name else WHAT_IT_SEES.format(end=end))
    alone = python(*command, at=at, flags=["-O"])
    ours = vitkern_run(*command, at=at, flags=["-O"])
    assert (ours.stdout, ours.stderr, ours.returncode) == (alone.stdout, alone.stderr, alone.returncode)
    assert ours.returncode in (1, 7) and ours.stdout.endswith("False\n")


@pytest.mark.slow
def test_children_find_the_kernels(write):
    done = vitkern_run("script.py", at=write("script.py", CHILDREN))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["vitkern.compat.deformable_detr"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--override"]], ids=["left", "overridden"])
def test_an_installed_extension_is_left_and_that_is_said(options, write):
    write(f"{EXTENSION}.py", REAL)
    at = write(
        "script.py", f"import {EXTENSION} as M; print(M.ms_deform_attn_forward.__module__, M.another())"
    )
    done = vitkern_run(*options, "script.py", at=at)
    if options:
        assert done.stdout == "vitkern.compat.deformable_detr theirs\n" and not done.stderr
    else:
        assert done.stdout == f"{EXTENSION} theirs\n"
        assert f"vitkern run: left as it is: {EXTENSION} (compiled module): installed, from " in done.stderr


def test_mmcv_lite_in_a_script(write):
    for name, text in MMCV_LITE.items():
        write(name, text)
    at = write("script.py", "import mmcv.ops as o; print(o.MultiScaleDeformableAttention.forward.replaces)")
    done = vitkern_run("script.py", at=at)
    assert done.stdout.startswith("<function MultiScaleDeformableAttention.forward"), done.stderr


def test_compiled_modules_of_packages_that_are_not_installed(write):
    at = write(
        "script.py", "import detrex._C, groundingdino._C as c; print(c.ms_deform_attn_forward.__module__)"
    )
    done = vitkern_run("script.py", at=at)
    assert done.stdout == "vitkern.compat.deformable_detr\n", done.stderr


def test_another_sitecustomize_has_its_turn(write):
    at = write("other/sitecustomize.py", "import sys; sys.other = True")
    write("script.py", "import os, sys; print(sys.other, 'startup' in ''.join(sys.path))")
    done = vitkern_run("script.py", at=at, PYTHONPATH=os.pathsep.join([str(at / "other"), *sys.path]))
    assert done.stdout == "True False\n", done.stderr


def test_what_keeps_python_from_preparing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(run.sys, "flags", type("Flags", (), {"ignore_environment": 1, "no_site": 0}))
    assert run.main(["script.py"], override=False) == 2
    assert "python -E, -I and -S keep it from preparing the script" in capsys.readouterr().err


def test_startup_waits_for_every_package():
    text = (run.STARTUP / "sitecustomize.py").read_text(encoding="utf-8")
    packages = {ecosystem.extension.partition(".")[0] for ecosystem in ECOSYSTEMS.values()} | {tao.PACKAGE}
    assert all(f'"{package}"' in text for package in packages)
