# SPDX-License-Identifier: Apache-2.0
"""`vitkern doctor` reports a working installation correctly, and still runs if something is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitkern
from vitkern import _C
from vitkern.commands import doctor
from vitkern.ops.backends import BACKENDS

ROOT = Path(__file__).parents[1]


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """`vitkern doctor` in a process where `module` cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; from vitkern.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_facts_are_those_of_the_running_build():
    facts = json.loads(json.dumps(doctor.examine()))
    assert facts["vitkern"]["version"] == vitkern.__version__
    assert facts["vitkern"]["installed_at"] == str(Path(vitkern.__file__).parent)
    assert facts["vitkern"]["error"] is None
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["chosen"] == _C.cpu_isa()
    assert facts["cuda"]["architectures"] == _C.cuda_architectures.split()
    assert set(facts["backends"]) == set(BACKENDS)
    assert facts["backends"]["cpu"] is None


def test_either_there_is_cuda_or_a_reason():
    cuda = doctor.examine()["cuda"]
    assert (cuda["compiled_with"] is None) == bool(cuda["reason"])
    assert bool(cuda["devices"]) != bool(cuda["devices_reason"])


@pytest.mark.parametrize(
    "driver, row",
    [
        (12020, "the CUDA kernels need a driver for CUDA 13.0 or later, the driver here is for CUDA 12.2"),
        (13010, "for CUDA 13.1, which serves the kernels' CUDA 13.0"),
        (0, "the CUDA kernels need a driver for CUDA 13.0 or later, and no NVIDIA driver was found"),
    ],
)
def test_the_driver_is_told_beside_what_the_kernels_need(driver, row, monkeypatch):
    monkeypatch.setattr(_C, "cuda_version", "13.0.88")
    monkeypatch.setattr(_C, "cuda_driver", lambda: (driver, 13000))
    facts = doctor.examine()
    (told,) = (line for line in doctor.report(facts).splitlines() if line.split()[:1] == ["driver"])
    assert row in told
    if not torch.cuda.is_available():
        assert facts["backends"]["cuda"] == (facts["cuda"]["driver_reason"] or "torch sees no GPU")


def test_the_driver_is_asked_without_one():
    driver, runtime = _C.cuda_driver()
    assert driver >= 0 and (runtime >= 11000) == (_C.cuda_version is not None)


def test_report_has_every_backend_and_set_variable(monkeypatch):
    monkeypatch.setenv("VITKERN_VALIDATE", "1")
    lines = [line.split() for line in doctor.report(doctor.examine()).splitlines()]
    assert ["VITKERN_VALIDATE", "1"] in lines
    for backend in BACKENDS:
        assert any(line[:1] == [backend] for line in lines)


def test_every_variable_is_documented():
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [name for name in doctor.ENVIRONMENT if f"`{name}" not in text] == []


@pytest.mark.parametrize(
    "entry",
    [[sys.executable, "-m", "vitkern"], [str(Path(sys.executable).with_name("vitkern"))]],
    ids=["module", "command"],
)
def test_command_line(entry):
    process = subprocess.run([*entry, "doctor", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["vitkern"]["version"] == vitkern.__version__


@pytest.mark.parametrize(("module", "status"), [("vitkern._C", 1), ("torch", 1), ("triton", 0)])
def test_reports_what_does_not_load_instead_of_failing(module, status):
    process = run_without(module)
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    assert "not load" in process.stdout.lower()
    facts = json.loads(run_without(module, "--json").stdout)
    assert facts[module.partition(".")[0]]["error"]


@pytest.mark.parametrize("command", ["doctor", "bench run", "bench compare", "check"])
def test_help_needs_nothing_but_python(command):
    code = "import sys; sys.modules['torch'] = None; from vitkern.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, *command.split(), "--help"]
    process = subprocess.run(words, capture_output=True, text=True, check=True)
    assert process.stdout.startswith(f"usage: vitkern {command}")


def test_package_without_its_compiled_module_says_so_when_used():
    code = "import sys; sys.modules['vitkern._C'] = None; import vitkern; vitkern.ms_deform_attn"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: vitkern does not load" in process.stderr
    assert "python -m vitkern doctor" in process.stderr


def test_instruction_set_follows_the_environment(monkeypatch):
    command = [sys.executable, "-m", "vitkern", "doctor", "--json"]
    for name in ("baseline", "sse9"):
        monkeypatch.setenv("VITKERN_CPU_ISA", name)
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        facts = json.loads(process.stdout)
        cpu = facts["cpu"]
        assert cpu["chosen"] == (None if name == "sse9" else name)
        assert facts["backends"]["cpu"] == cpu.get("error")
    assert (
        "VITKERN_CPU_ISA: cpu instruction set 'sse9' cannot be used; this build has: baseline" in cpu["error"]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_gpu_is_listed():
    assert len(doctor.examine()["cuda"]["devices"]) == torch.cuda.device_count()
