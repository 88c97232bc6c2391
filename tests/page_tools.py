"""What tests of the page need of a machine (node, npm's packages, a Chromium), or a skip that names what is missing."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).resolve().parents[1] / "web"
NODE = 20
NPM_S = 300
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")


@functools.cache
def _missing() -> str:
    """Why node or the packages of web/package.json are not here, or ""; packages are installed where they can be."""
    try:
        said = subprocess.run(["node", "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    except OSError:
        return f"node {NODE} or later is missing (Debian: nodejs npm)"
    if int(said.strip().removeprefix("v").partition(".")[0] or 0) < NODE:
        return f"node {NODE} or later is missing, this is {said.strip()}"
    package = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    names = [*package["dependencies"], *package["devDependencies"]]
    with (WEB / "package.json").open() as lock:  # one process at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all((WEB / "node_modules" / name / "package.json").is_file() for name in names):
            return ""
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(WEB)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"npm ci of web/ did not run: {error}"
    return "" if done.returncode == 0 else f"npm ci of web/ failed: {done.stderr.strip().splitlines()[-1:]}"


def packages() -> None:
    """node and the packages of web/package.json, or a skip."""
    if reason := _missing():
        pytest.skip(reason)


def part(name: str, **given: Any) -> Any:
    """The answer of a part of web/test/pieces.mjs."""
    packages()
    line = json.dumps({"part": name, **given})
    command = ["node", str(WEB / "test/pieces.mjs")]
    done = subprocess.run(command, input=line, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def browser() -> str:
    """A Chromium, or a skip."""
    for name in (os.environ.get("CHROMIUM"), *BROWSERS):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no Chromium on PATH (Debian: chromium)")


def act(scenario: str, address: str, folder: Path, timeout_s: float = 900, **given: Any) -> Any:
    """What a scenario of web/test/page.mjs saw; `folder` has its screenshots afterwards."""
    packages()
    folder.mkdir(parents=True, exist_ok=True)
    command = ["node", str(WEB / "test/page.mjs"), scenario, address, str(folder), json.dumps(given)]
    environment = {**os.environ, "CHROMIUM": browser()}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
