# SPDX-License-Identifier: Apache-2.0
"""A page in a headless Chromium: a screenshot and the messages on its console."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium")

# No name is resolved: a page has to do without what lies elsewhere.
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--enable-logging=stderr",
    "--window-size=1400,1600",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--virtual-time-budget=5000",
)


def complaints(url: str, picture: Path) -> list[str]:
    """Saves a screenshot of `url` as the PNG file `picture` and returns the messages on the console."""
    profile = picture.with_suffix(".profile")
    command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}", f"--screenshot={picture}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert picture.exists(), done.stderr
    assert picture.stat().st_size > 20_000, done.stderr
    return re.findall(r".*CONSOLE.*", done.stderr)
