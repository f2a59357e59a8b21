# SPDX-License-Identifier: Apache-2.0
"""The shipped files: the source distribution builds the wheel, the wheel holds the package and imports anywhere."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def python(*arguments: object, executable: object = sys.executable, **options) -> str:
    """Runs Python in a process that must succeed, and returns its output."""
    done = subprocess.run([str(executable), *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel that pip builds from the source distribution; without CUDA, whose sources test_cuda_* compile."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "VITKERN_CUDA": "OFF"}
    python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, env=environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel and this environment's packages, but not this checkout."""
    folder = tmp_path_factory.mktemp("venv")
    python("-m", "venv", "--without-pip", folder)
    interpreter = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    purelib = python(
        "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=interpreter
    ).strip()
    python("-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (Path(purelib) / "lent.pth").write_text("\n".join(lent))
    return interpreter


def test_sdist_holds_the_sources_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    tops = {name.split("/")[0] for name in files}
    licences = {"LICENSE", "README.md", "CHANGELOG.md", "PKG-INFO"}
    assert tops == {"CMakeLists.txt", "pyproject.toml", "csrc", "python", "triton_kernels"} | licences
    assert {
        "csrc/ms_deform_attn/cuda.cu",
        "python/vitkern/compat/startup/sitecustomize.py",
        "python/vitkern/py.typed",
        "triton_kernels/ms_deform_attn.py",
    } <= files
    assert not [name for name in files if name.endswith((".so", ".pyd", ".pyc", ".o"))]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    package = [name for name in files if name.startswith("vitkern/")]
    metadata = [name for name in files if ".dist-info/" in name]
    assert sorted(package + metadata) == sorted(files)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    expected = [
        "__init__.py",
        f"_C{suffix}",
        "_C.pyi",
        "py.typed",
        "cli.py",
        "commands/doctor.py",
        "nn/__init__.py",
    ]
    expected += ["compat/startup/sitecustomize.py"]  # no package: it goes on PYTHONPATH
    assert [name for name in expected if f"vitkern/{name}" not in package] == []
    assert "vitkern/triton_kernels/ms_deform_attn.py" in package
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert not [name for name in package if not name.endswith((".py", ".pyi", "py.typed", suffix))]


def test_wheel_imports_and_runs_from_another_folder(elsewhere, tmp_path):
    program = (
        "import vitkern as v; print(v.__file__); print(tuple(v.nn.MSDeformAttn(64).output_proj.weight.shape))"
    )
    where, shape = python("-c", program, executable=elsewhere, cwd=tmp_path).splitlines()
    assert str(ROOT) not in where
    assert shape == "(64, 64)"
    text = python("-m", "vitkern", "doctor", executable=elsewhere, cwd=tmp_path)
    assert "it was built with VITKERN_CUDA=OFF" in text


def test_wheel_measures_itself(elsewhere, tmp_path):
    rows = "--op token_project --case vt-resnet18 --dtype fp32 --pass forward --device cpu --seconds 0.1"
    run = f"-m vitkern bench run {rows} --json out.json"
    assert "0 FAILED" in python(*run.split(), executable=elsewhere, cwd=tmp_path)
    python("-m", "vitkern", "bench", "report", "out.json", executable=elsewhere, cwd=tmp_path)
    assert (tmp_path / "out.html").exists()


@pytest.mark.parametrize("module", ["triton", "matplotlib", "numpy"])
def test_wheel_imports_without(module, elsewhere, tmp_path):
    program = f"import sys; sys.modules[{module!r}] = None; import vitkern; vitkern.ms_deform_attn"
    python("-W", "ignore", "-c", program, executable=elsewhere, cwd=tmp_path)


def test_version_is_the_same_everywhere():
    import vitkern

    assert vitkern.__version__ == importlib.metadata.version("vitkern")
    assert f"\nversion: {vitkern.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_editable_install_reads_this_checkout():
    import vitkern
    from vitkern import triton_kernels

    if "site-packages" in vitkern.__file__:
        pytest.skip("this is no editable install")
    assert Path(vitkern.__file__).is_relative_to(ROOT / "python")
    assert Path(triton_kernels.__file__).is_relative_to(ROOT / "triton_kernels")


def test_cuda_cannot_be_demanded_where_there_is_no_nvcc(tmp_path):
    """The build fails with advice; it does not silently lack the kernels."""
    nowhere = {name: text for name, text in os.environ.items() if not name.startswith("CUDA")}
    nowhere |= {"VITKERN_CUDA": "ON", "CUDACXX": str(tmp_path / "nvcc")}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    command += [f"--config-settings=build-dir={tmp_path / 'build'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=nowhere)
    assert done.returncode != 0
    assert "VITKERN_CUDA=OFF does without" in " ".join((done.stdout + done.stderr).split())
