# SPDX-License-Identifier: Apache-2.0
"""The address of the repository, defined only here, and the links, badges and metadata made from it.

Without an address, the README has relative links and no badges. Once ADDRESS is set, `python tools/address.py` writes
badges into README.md, [project.urls] into pyproject.toml and repo_url into mkdocs.yml, and makes the links of README.md
absolute, as package indexes need them. A test compares the files with this address.
"""

from __future__ import annotations

import re
from pathlib import Path

ADDRESS = ""  # such as https://github.com/OWNER/vitkern

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
TITLE = "# vitkern\n"


def readme(text: str, address: str) -> str:
    """README.md with links and badges of this address; without an address, with relative links and no badges."""
    text = re.sub(r"\]\(https?://\S+?/(?:blob|raw)/main/", "](", text)
    text = re.sub(rf"(?<={TITLE})\n\[!\[.*\n", "", text)
    if not address:
        return text
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)", rf"![\1]({address}/raw/{BRANCH}/", text)
    text = re.sub(r"(?<!!)(\[[^]!]*\])\((?!https?:|#)", rf"\1({address}/blob/{BRANCH}/", text)
    return text.replace(TITLE, f"{TITLE}\n{badge(address)}\n", 1)


def badge(address: str) -> str:
    workflow = f"{address}/actions/workflows/ci.yml"
    return f"[![tests]({workflow}/badge.svg)]({workflow})"


def pyproject(text: str, address: str) -> str:
    text = re.sub(r"\[project\.urls\]\n(?:.+\n)*\n", "", text)
    urls = f'[project.urls]\nSource = "{address}"\nIssues = "{address}/issues"\n\n' if address else ""
    return text.replace("[project.scripts]\n", f"{urls}[project.scripts]\n", 1)


def mkdocs(text: str, address: str) -> str:
    text = re.sub(r"^repo_url: .*\n", "", text, flags=re.MULTILINE)
    url = f"repo_url: {address}\n" if address else ""
    return text.replace("docs_dir: docs\n", f"{url}docs_dir: docs\n", 1)


FILES = {"README.md": readme, "pyproject.toml": pyproject, "mkdocs.yml": mkdocs}

if __name__ == "__main__":
    for name, change in FILES.items():
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), ADDRESS), encoding="utf-8")
