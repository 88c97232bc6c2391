"""The artifact: a folder with a manifest, a library, parameters and a tokenizer, checked before anything in it is used.

The manifest carries the sha256 of every file and a digest of itself: the sha256 of its own text with the digest's 64
characters replaced by zeros. So one flipped byte anywhere is found and named.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.files import MARKER, sha256

FORMAT = 1
NO_DIGEST = "0" * 64
AGAIN = "compile it again with python -m gpt2_tvm.compile"
OWN, MLC = "own", "mlc"  # interfaces: whose engines call an artifact's functions (gpt2_tvm/mlc)
INTERFACES = (OWN, MLC)
SCORE_ROWS = (
    128  # rows that an artifact's `score` takes at a time: their logits are the largest tensor that ever exists
)


@dataclass(frozen=True)
class Artifact:
    """A verified artifact. `manifest` is the parsed manifest.json."""

    path: Path
    manifest: dict[str, Any]

    @property
    def config(self) -> GPT2Config:
        return GPT2Config.from_json(self.manifest["config"])

    @property
    def kind(self) -> str:
        return str(self.manifest["target"]["kind"])

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(self.manifest["batch_sizes"])

    @property
    def verify_widths(self) -> tuple[int, ...]:
        return tuple(self.manifest["verify_widths"])

    @property
    def streams(self) -> dict[str, Any] | None:
        """Of streams in the model (`streams.StreamPlan`): how many, the rows of a tree, …; None without."""
        return self.manifest.get("streams")

    @property
    def max_seq_len(self) -> int:
        return int(self.manifest["max_seq_len"])

    @property
    def library(self) -> Path:
        return self.path / self.manifest["library"]

    @property
    def params(self) -> Path:
        return self.path / "params"

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer's files; None for a model that came without one."""
        folder = self.path / "tokenizer"
        return folder if folder.is_dir() else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Add the sha256 and size of every file in `folder` and the manifest's own digest, and write manifest.json."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    table = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    text = json.dumps({"format": FORMAT, "digest": NO_DIGEST, **manifest, "files": table}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / MARKER).write_text(text.replace(NO_DIGEST, digest, 1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, its digest checked; UserError in one line when it is missing, damaged or of another
    format."""
    if not folder.exists():
        raise UserError(f"no artifact at {folder}; make one with python -m gpt2_tvm.compile --output {folder}")
    path = folder / MARKER
    if not path.is_file():
        raise UserError(f"{folder} is not an artifact (it has no {MARKER}); make one with python -m gpt2_tvm.compile")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        digest = manifest["digest"]
        intact = hashlib.sha256(raw.replace(digest.encode(), NO_DIGEST.encode(), 1)).hexdigest() == digest
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged (its digest does not match); {AGAIN}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder} has artifact format {manifest.get('format')}, this program reads {FORMAT}; {AGAIN}")
    return dict(manifest)


def check_versions(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse an artifact built by another TVM: its runtime ABI may differ, and a mismatch can crash the process."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("apache-tvm", "apache-tvm-ffi"):
        built = manifest["versions"].get(package)
        try:
            here = version(package)
        except PackageNotFoundError:
            here = "none"
        if built != here:
            raise UserError(f"{folder} was compiled with {package} {built}, this machine has {here}; {AGAIN}")


def open_artifact(path: str | Path, verify: bool = True, versions: bool = True, interface: str = OWN) -> Artifact:
    """Read and check an artifact: manifest, versions, and (verify) every file's size and sha256, files in parallel.

    interface: one of `INTERFACES`; an artifact of the other is refused, since none of its functions would be found.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if versions:
        check_versions(folder, manifest)
    _check_interface(folder, manifest, interface)

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, expected = item
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} is truncated or changed ({file.stat().st_size} bytes instead of {expected['bytes']})"
        if verify and sha256(file) != expected["sha256"]:
            return f"{file} is damaged (its sha256 does not match)"
        return None

    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(check, manifest["files"].items()) if fault]
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}; {AGAIN}")
    return Artifact(folder, manifest)


def _check_interface(folder: Path, manifest: dict[str, Any], wanted: str) -> None:
    found = manifest.get("interface", OWN)
    if found == wanted:
        return
    if found == MLC:
        raise UserError(
            f"{folder} has the functions that mlc-llm and web-llm call, which this command does not; take it to them "
            "with python -m gpt2_tvm.export_mlc, or compile again without --interface mlc"
        )
    raise UserError(
        f"{folder} was compiled for this project's own engine; {AGAIN} --interface mlc --output ANOTHER_FOLDER"
    )
