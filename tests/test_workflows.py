# SPDX-License-Identifier: Apache-2.0
"""The workflow that other repositories call: the packages that it installs on their runner."""

import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).parent.parent / ".github" / "workflows" / "gradcheck-gpu.yml"
FAKE_PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> %s\\n' "$SAID" > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


def script(step: str) -> str:
    found = re.search(
        rf"- name: {step}\n.*?run: \|\n(.*?)^      - ", WORKFLOW.read_text(), re.DOTALL | re.MULTILINE
    )
    return textwrap.dedent(found[1])


@pytest.mark.skipif(shutil.which("bash") is None, reason="the workflow is for bash")
@pytest.mark.parametrize(
    "asked, told, installed",
    [
        ("", {"REPOSITORY": "them/vitkern", "VERSION": "0123"}, "git+https://host/them/vitkern@0123"),
        ("vitkern==1.0", {"REPOSITORY": "", "VERSION": ""}, "vitkern==1.0"),
        ("", {"REPOSITORY": "", "VERSION": ""}, None),
        ("", {"REPOSITORY": "them/vitkern", "VERSION": ""}, None),
    ],
)
def test_vitkern_comes_from_where_the_workflow_comes_from(asked, told, installed, tmp_path):
    """The source is the workflow's repository or the caller's input, never a bare name, which anyone could register."""
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    said = tmp_path / "said"
    variables = {"VITKERN": asked, **told, "TORCH": "torch", "INDEX": "https://index", "SAID": str(said)}
    variables |= {"GITHUB_SERVER_URL": "https://host", "RUNNER_TEMP": str(tmp_path)}
    variables |= {"GITHUB_PATH": str(tmp_path / "path"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script("Environment")]
    done = subprocess.run(bash, env=variables, capture_output=True, text=True)
    if installed is None:
        assert done.returncode != 0
        assert "say in the input 'vitkern' what to install" in done.stderr
        assert not said.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert said.read_text().splitlines()[-1] == f"install {installed}"


@pytest.mark.xdist_group("together")
def test_a_worker_runs_whole_groups(request):
    """Otherwise each worker would build what a group's tests share. pytest-xdist reads pytest's private attributes."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@together")
