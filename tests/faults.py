"""What the tests of faults share: how an error must look, and that files stay as they were."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2_tvm.artifact import read_manifest, write_manifest
from gpt2_tvm.errors import UserError


def refusal(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` raises; it must be one line that says something."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message.split()) >= 4
    return message


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and its digest."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def seal(folder: Path, **changes: Any) -> Path:
    """Give the manifest other values, and right digests for them and for what the files now are."""
    manifest = {key: value for key, value in read_manifest(folder).items() if key not in ("format", "digest", "files")}
    (folder / "manifest.json").unlink()
    write_manifest(folder, {**manifest, **changes})
    return folder


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "unexpected" not in line and "Traceback" not in done.stderr
    for part in parts:
        assert part in line
