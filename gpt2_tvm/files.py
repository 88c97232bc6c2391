"""Writing beside and renaming, so that nothing half-written is ever left under a final name.

A folder being filled is locked (flock, which the system releases when its process dies, however it dies): that is how
the next writer tells what a killed one left behind from what a living one is still filling.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gpt2_tvm.errors import UserError

MARKER = "manifest.json"  # what makes a folder an artifact, and so ours to replace

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_RENAME_SWAP = 2  # <sys/stdio.h> of macOS


@contextmanager
def replacing_folder(final: Path, marker: str = MARKER) -> Iterator[Path]:
    """A new folder beside `final` to fill; renamed to `final` when the block ends well, removed when it does not.

    An artifact that stands at `final` stays whole until the new one is, and where the system can exchange two names
    (Linux, macOS) there is no moment without one. What killed processes left beside `final` is removed first. A folder
    that is not an artifact is refused, or, of another kind, that has no file `marker`.

    Raises UserError where `final` is not ours to replace or cannot be written; OSError (a full disk) passes through.
    """
    final = final.absolute()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(final)
        if final.exists() and (not final.is_dir() or (any(final.iterdir()) and not (final / marker).exists())):
            ours = "an artifact" if marker == MARKER else f"a folder with {marker}"
            raise UserError(f"{final} exists and is not {ours} of ours; choose another --output, or remove it")
        work, lock = _locked_folder(final)
    except OSError as error:
        raise UserError(f"cannot write to {final.parent}: {error.strerror}; choose another --output") from error
    try:
        work.chmod(0o755)
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(work)
        _replace(work, final)
        with suppress(OSError):
            _sync(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(final: Path) -> tuple[Path, int | None]:
    """A new folder beside `final`, and the descriptor that holds its lock (None where there are no locks)."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
        lock = _lock(work)
        if lock is None or work.exists():  # another process may have taken it for a dead one's, unlocked yet
            return work, lock
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on `folder`; None if another process does, or locks are not to be had."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


def _clean_up(final: Path) -> None:
    """Put right what killed processes left beside `final`: an artifact moved aside comes back, unfinished ones go."""
    for left in sorted(final.parent.glob(f".{final.name}.*")):
        if left.suffix not in (".partial", ".old") or not left.is_dir():
            continue
        lock = _lock(left)
        if lock is None:
            continue  # somebody is at work in it
        if left.suffix == ".old" and not final.exists() and (left / MARKER).exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _replace(work: Path, final: Path) -> None:
    """Give `work` the name `final`. What had it is then at `work`'s old name, or gone."""
    if not final.exists():
        work.rename(final)
    elif not _exchange(work, final):
        old = work.with_suffix(".old")
        try:
            final.rename(old)
            work.rename(final)
        except BaseException:
            if old.exists() and not final.exists():
                old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where this system or file system cannot."""
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(first, second, _RENAME_SWAP) == 0
        return libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0
    except (AttributeError, OSError, TypeError):  # an older C library, or Windows
        return False


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` to write bytes to; synced and renamed to `path` when the block ends well, else removed.

    `path` may also be a device or a pipe (/dev/stdout): that is written to as it is. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def require_room(folder: Path, size: int) -> None:
    """Find out by writing `size` bytes, removed again, that `folder` takes them: free space, quota and limits in one.

    For before a library writes that dies when it cannot, as LLVM does. Raises the OSError that it would have met.
    """
    piece = bytes(min(size, 1 << 20))
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(0, size, len(piece)):
            file.write(piece)
        file.flush()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`: beside it first, synced, then renamed."""
    with replacing_file(path) as file:
        file.write(text.encode("utf-8"))


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
