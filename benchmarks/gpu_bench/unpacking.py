"""A packed kit, unpacked beside itself: with nothing but Python, since what else there is lies inside."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

SUFFIX = ".tar.xz"


try:
    from gpt2_tvm.errors import UserError as KitError
except ImportError:  # before the kit's packages are there

    class KitError(Exception):  # type: ignore[no-redef]
        """A kit that cannot be unpacked, in one line."""


def unpacked(archive: Path) -> Path:
    """The folder of a packed kit, NAME-DIGEST beside it; made once, whole or not at all.

    Raises KitError (the project's UserError, where that is at hand) for what is not a kit or is damaged.
    """
    try:
        digest = hashlib.sha256()
        with archive.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise KitError(
            f"{archive} cannot be read ({error.strerror}); make it with python benchmarks/gpu.py pack-kit"
        ) from None
    folder = archive.with_name(f"{archive.name.removesuffix(SUFFIX)}-{digest.hexdigest()[:12]}")
    if folder.is_dir():
        return folder
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=archive.parent))
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        inside = [path for path in scratch.iterdir() if (path / "kit.json").is_file()]
        if len(inside) != 1:
            raise KitError(f"{archive} is no kit; make one with python benchmarks/gpu.py pack-kit")
        try:
            inside[0].rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise KitError(f"{archive} is damaged ({error}); copy it again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def hand_over(kit: Path) -> None:
    """On a bare Python: go on in the packed kit that --kit names, else in `kit`, which brings what is missing here."""
    given = [word.removeprefix("--kit=") for word in sys.argv[1:]]
    for i, word in enumerate(sys.argv[1:]):
        if word == "--kit" and i + 1 < len(given):
            kit, given = Path(given[i + 1]), given[:i] + given[i + 2 :]
        elif word.startswith("--kit="):
            kit, given = Path(given[i]), given[:i] + given[i + 1 :]
    try:
        folder = unpacked(kit)
    except KitError as error:
        sys.exit(f"error: {error}")
    os.execv(sys.executable, [sys.executable, str(folder / "gpu.py"), *given])
