# SPDX-License-Identifier: Apache-2.0
"""`vitkern doctor`: the installed software, the backends that run on this machine, and why others cannot.

``examine`` collects facts as plain data (``--json`` prints it), ``report`` lays them out. Both must work if the
compiled module, torch or triton is missing or broken: the command exists for these cases.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import vitkern

Facts = dict[str, Any]

# Every variable that changes what vitkern does; docs/environment.md explains them.
ENVIRONMENT = (
    "VITKERN_BACKEND",
    "VITKERN_CPU_ISA",
    "VITKERN_VALIDATE",
    "VITKERN_RUN",
    "VITKERN_EMULATED",
    "VITKERN_CUDA",
    "VITKERN_CUDA_ARCHITECTURES",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def cpu_model() -> str:
    """The name of the processor, if the system reports it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            or platform.machine()
        )
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, text = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model"):
                return text.strip()
    return platform.processor() or platform.machine()


def examine() -> Facts:
    """The facts of the report, as data for JSON."""
    torch, torch_error = _load("torch")
    # After torch, whose OpenMP library and C++ runtime the compiled module shares.
    native, native_error = _load("vitkern._C")
    cpu = _cpu(torch, native)
    return {
        "vitkern": _vitkern(native, native_error),
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "torch": _torch(torch, torch_error),
        "triton": _triton(),
        "cpu": cpu,
        "cuda": _cuda(torch, native),
        # If the instruction set that the user names is not available, every call of the CPU kernels raises.
        "backends": _backends() | ({"cpu": cpu["error"]} if "error" in cpu else {}),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """A module, or a description of the failure. A broken library may raise anything, so anything is caught."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _vitkern(native: ModuleType | None, error: str | None) -> Facts:
    facts: Facts = {
        "installed_at": str(Path(vitkern.__file__).parent),
        "compiled_module": None,
        "error": error,
    }
    try:
        facts["version"] = importlib.metadata.version("vitkern")
    except importlib.metadata.PackageNotFoundError:
        facts["version"] = None
    if native is not None:
        facts |= {"version": native.version, "compiled_module": native.__file__, "compiler": native.compiler}
    return facts


def _torch(torch: Any, error: str | None) -> Facts:
    if torch is None:
        return {"version": None, "error": error}
    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "error": None}


def _triton() -> Facts:
    triton, error = _load("triton")
    return {"version": getattr(triton, "__version__", None), "error": error}


def _cpu(torch: Any, native: Any) -> Facts:
    facts: Facts = {"model": cpu_model(), "machine": platform.machine(), "logical_cores": os.cpu_count()}
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
    if native is not None:
        facts |= {"compiled": native.compiled_cpu_isas(), "supported": native.supported_cpu_isas()}
        try:
            facts["chosen"] = native.cpu_isa()
        except ValueError as error:  # VITKERN_CPU_ISA names a missing one
            facts |= {"chosen": None, "error": str(error)}
    return facts


def _cuda(torch: Any, native: Any) -> Facts:
    facts: Facts = {
        "compiled_with": None,
        "reason": None,
        "architectures": [],
        "driver": None,
        "runtime": None,
        "driver_reason": None,
        "devices": [],
        "devices_reason": None,
    }
    if native is None:
        facts["reason"] = "vitkern._C does not load"
    else:
        facts["compiled_with"] = native.cuda_version
        facts["reason"] = native.cuda_reason or None
        facts["architectures"] = native.cuda_architectures.split()
        facts |= _driver(native)
    if torch is None:
        facts["devices_reason"] = "torch does not load"
    elif torch.version.cuda is None:
        facts["devices_reason"] = "this torch was built without CUDA"
    elif not torch.cuda.is_available():
        facts["devices_reason"] = "torch finds no usable GPU or driver"
    else:
        facts["devices"] = [_device(torch, index, native) for index in range(torch.cuda.device_count())]
    return facts


def _driver(native: Any) -> Facts:
    """The CUDA versions of the driver and of the kernels' runtime, and the reason if they do not fit."""
    backends: Any = _load("vitkern.ops.backends")[0]
    if backends is None or native.cuda_version is None:
        return {}
    driver, runtime = native.cuda_driver()
    return {
        "driver": backends.cuda_version(driver) if driver else None,
        "runtime": backends.cuda_version(runtime),
        "driver_reason": backends.driver_objection(driver, runtime),
    }


def _device(torch: Any, index: int, native: Any) -> Facts:
    properties = torch.cuda.get_device_properties(index)
    facts: Facts = {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "reason": "no CUDA kernels were compiled",
    }
    if native is not None and native.cuda_version is not None:
        from vitkern.ops import backends

        facts["reason"] = backends.can_run("cuda", torch.device("cuda", index), torch.float32)
    return facts


def _backends() -> dict[str, str | None]:
    """For each backend None, or why it cannot run."""
    backends, error = _load("vitkern.ops.backends")
    if backends is None:
        return dict.fromkeys(("cpu", "cuda", "triton", "reference"), f"vitkern does not load ({error})")
    reasons: dict[str, str | None] = backends.explain()
    return reasons


def report(facts: Facts) -> str:
    """The facts as an aligned table under headings."""
    sections = {
        "versions": _version_rows(facts),
        "cpu": _cpu_rows(facts["cpu"]),
        "cuda": _cuda_rows(facts["cuda"]),
        "backends": [(name, reason or "ready") for name, reason in facts["backends"].items()],
        "environment": list(facts["environment"].items()) or [("", "none of vitkern's variables is set")],
    }
    width = max(len(label) for rows in sections.values() for label, _ in rows) + 2
    lines = []
    for heading, rows in sections.items():
        lines.append(heading)
        lines += [f"  {label:<{width}}{text}".rstrip() for label, text in rows]
        lines.append("")
    return "\n".join(lines).rstrip()


def _version_rows(facts: Facts) -> list[tuple[str, str]]:
    vitkern, python, torch, triton = (facts[name] for name in ("vitkern", "python", "torch", "triton"))
    rows = [("vitkern", f"{vitkern['version'] or 'not installed'} in {vitkern['installed_at']}")]
    if vitkern["error"] is None:
        rows.append(("compiled with", vitkern["compiler"]))
    else:
        rows.append(("compiled module", f"DOES NOT LOAD: {vitkern['error']}"))
    rows += [
        ("python", f"{python['version']} on {python['platform']}"),
        (
            "torch",
            f"DOES NOT LOAD: {torch['error']}" if torch["error"] else f"{torch['version']} {_build(torch)}",
        ),
        ("triton", triton["version"] or f"does not load: {triton['error']}"),
    ]
    return rows


def _build(torch: Facts) -> str:
    if torch["hip"]:
        return f"(HIP {torch['hip']})"
    return f"(CUDA {torch['cuda']})" if torch["cuda"] else "(CPU only)"


def _cpu_rows(cpu: Facts) -> list[tuple[str, str]]:
    threads = f", torch uses {cpu['threads']} threads" if "threads" in cpu else ""
    rows = [
        ("processor", f"{cpu['model']} ({cpu['machine']}), {cpu['logical_cores']} logical cores{threads}")
    ]
    if "compiled" in cpu:
        rows += [
            (
                "instruction sets",
                f"compiled {', '.join(cpu['compiled'])}; supported {', '.join(cpu['supported'])}",
            ),
            ("chosen", cpu["chosen"] or f"NONE: {cpu['error']}"),
        ]
    return rows


def _cuda_rows(cuda: Facts) -> list[tuple[str, str]]:
    if cuda["compiled_with"] is None:
        rows = [("kernels", f"not compiled: {cuda['reason']}")]
    else:
        rows = [
            ("kernels", f"compiled by nvcc {cuda['compiled_with']} for sm {' '.join(cuda['architectures'])}")
        ]
    if cuda["runtime"] is not None:
        serves = f"for CUDA {cuda['driver']}, which serves the kernels' CUDA {cuda['runtime']}"
        rows.append(("driver", cuda["driver_reason"] or serves))
    rows += [("gpu", f"none: {cuda['devices_reason']}")] if cuda["devices_reason"] else []
    for device in cuda["devices"]:
        about = f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']} GiB"
        rows.append((f"gpu {device['index']}", f"{about}: {device['reason'] or 'the kernels run on it'}"))
    return rows


def main(*, as_json: bool = False) -> int:
    """Prints the report; returns 1 if vitkern itself cannot be used."""
    facts = examine()
    print(json.dumps(facts, indent=2) if as_json else report(facts))
    return 1 if facts["vitkern"]["error"] or facts["torch"]["error"] else 0
