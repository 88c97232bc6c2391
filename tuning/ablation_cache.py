"""What children compile, kept: one artifact for each scheduled module, under the digest of what it was made from.

A folder is called <code>-<sources>: the digest of the scheduled module with all that decides the rest of an artifact,
and that of this project's own sources, whose change may change what is made of the same module.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2_tvm.artifact import read_manifest
from gpt2_tvm.checkpoint import ModelSource, weight_files
from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.registry import OUTSIDE

EDGE = 1 << 20  # of a weight file its first and last MiB are hashed: 6 GB would take a minute each time
ROOT = Path(__file__).resolve().parent.parent


def digest(value: Any) -> str:
    """16 hexadecimal digits for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sources(rules: Iterable[str] = (), target: Path | None = None) -> str:
    """The digest of the sources that make an artifact: gpt2_tvm, targets, the target's own file, and the modules of
    `rules` that are somebody else's (module:Class)."""
    files = sorted([*(ROOT / "gpt2_tvm").rglob("*.py"), *(ROOT / "targets").glob("*.py")])
    files += sorted((ROOT / "targets").glob("*.toml")) + ([target] if target is not None else [])
    for rule in rules:
        if OUTSIDE.fullmatch(rule):
            with suppress(ImportError, ValueError):  # a rule that cannot be found is refused where it is made
                spec = importlib.util.find_spec(rule.partition(":")[0])
                if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
                    files.append(Path(spec.origin))
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:8]


def weights_identity(source: ModelSource) -> str:
    """Which weights these are: the seed of random ones, or the digest of a checkpoint's files (names, sizes, edges)."""
    if source.folder is None:
        return f"random, seed {source.seed}"
    found = hashlib.sha256()
    for path in weight_files(source.folder):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            found.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            found.update(file.read(EDGE))
    return f"sha256 {found.hexdigest()[:16]}"


def artifact_folder(cache: Path, code: str, made_from: str) -> Path:
    """Where the artifact of a code belongs, made from sources of that digest."""
    return cache / f"{code}-{made_from}"


def keep_one_copy(folder: Path) -> None:
    """Make the weights of a new artifact hard links to equal ones of its neighbours. Sets differ in code alone: without
    this ten sets of gpt2-xl hold 60 GB."""
    wanted = _params(folder)
    for other in sorted(folder.parent.glob("*-*")):
        if other == folder or not (other / "manifest.json").is_file():
            continue
        with suppress(UserError, OSError):  # a damaged neighbour, or a file system without links
            for name, sha256 in _params(other).items():
                if wanted.get(name) == sha256 and not (folder / name).samefile(other / name):
                    beside = folder / f"{name}.link"
                    os.link(other / name, beside)
                    beside.replace(folder / name)
                    del wanted[name]


def _params(folder: Path) -> dict[str, str]:
    files = read_manifest(folder)["files"]
    return {name: file["sha256"] for name, file in files.items() if name.startswith("params/")}
