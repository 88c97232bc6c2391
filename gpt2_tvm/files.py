"""Writing beside and renaming, so that nothing half-written is ever left under a final name."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_tvm.errors import UserError

MARKER = "manifest.json"  # what makes a folder an artifact, and so ours to replace


@contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to fill; renamed to `final` when the block ends well, removed when it does not.

    An artifact that stands at `final` stays whole until the new one is. A folder that is not an artifact is refused.
    """
    final = final.absolute()
    if final.exists() and (not final.is_dir() or (any(final.iterdir()) and not (final / MARKER).exists())):
        raise UserError(
            f"{final} exists and is not an artifact of ours; choose another --output, or remove it"
        )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {final.parent}: {error.strerror}; choose another --output"
        ) from error
    try:
        work.chmod(0o755)
        yield work
        old = work.with_suffix(".old")
        if final.exists():
            final.rename(old)
        try:
            work.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`: beside it first, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
