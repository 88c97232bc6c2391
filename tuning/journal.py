"""Files of JSON lines that survive anything: a header that says what they are of, then one synced line after the other.

A process killed in the middle of a line leaves it torn; it is cut off when the file is opened again, so that at most
the line in flight is lost. A file of something else is refused before it is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

Line = dict[str, Any]


class JournalFile:
    """An open journal; a base for what its lines mean (`note`).

    Attributes:
        format_name: what the header's "format" says, and the first thing in the file.
        identity: header keys that must agree with what this run would write, and how people call them; the rest of the
            header is told, not compared.
        maker: the command that writes such files, for messages.
    """

    format_name: ClassVar[str] = ""
    identity: ClassVar[Mapping[str, str]] = {}
    maker: ClassVar[str] = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Line = {}
        self._descriptor = -1

    def note(self, line: Line) -> None:
        """Called for each line after the header, when it is read and when it is appended."""

    def load(self) -> None:
        """Read without changing anything. UserError where there is no such file, or it is something else."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"there are no records at {self.path}; make them with {self.maker}") from None
        except (IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        if not self._take(data):
            raise UserError(f"{self.path} holds no records; make them with {self.maker}")

    def open(self, header: Mapping[str, Any], fresh: bool = False) -> None:
        """Go on with the file, or make it.

        fresh: begin anew; what was there is lost (but never a file of another kind). Raises UserError where the file
        is of something else, or in use; OSError for a full disk.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except (IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            data = self.path.read_bytes()
            if data and not self._is_ours(data):
                raise UserError(f"{self.path} is no file of {self.maker}; give another --records")
            kept = 0 if fresh else self._take(data)
            os.ftruncate(self._descriptor, kept)
            os.lseek(self._descriptor, 0, os.SEEK_END)
            if kept:
                self._compare(header)
            else:
                self.append({"format": self.format_name, **header})
        except BaseException:
            self.close()
            raise

    def append(self, line: Line) -> None:
        """Add a line and wait until it is on the disk. Where that fails (OSError) the file is as it was before."""
        data = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._note(line)

    def close(self) -> None:
        """Let go of the file and its lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is writing to {self.path}; wait for it, or give this one another --records"
            ) from None

    def _take(self, data: bytes) -> int:
        """Read every whole line; returns the number of bytes that they take."""
        kept = 0
        for raw in data.splitlines(keepends=True):
            try:
                line = json.loads(raw)
                whole = raw.endswith(b"\n") and isinstance(line, dict)
            except ValueError:
                whole = False
            last = kept + len(raw) == len(data)
            if not whole and last and not raw.endswith(b"\n") and (self.header or self._is_ours(data)):
                break  # torn by a kill: the next line goes here
            if not whole or (not self.header and line.get("format") != self.format_name):
                where = f"is damaged at byte {kept}" if self.header else f"is no file of {self.maker}"
                raise UserError(f"{self.path} {where}; give another --records, or begin anew with --fresh")
            try:
                self._note(line)
            except (KeyError, TypeError, ValueError, AttributeError):  # JSON, but not what this program writes
                raise UserError(
                    f"{self.path} is damaged at byte {kept}; give another --records, or begin anew with --fresh"
                ) from None
            kept += len(raw)
        return kept

    def _note(self, line: Line) -> None:
        if not self.header:
            self.header = line
        else:
            self.note(line)

    def _compare(self, header: Mapping[str, Any]) -> None:
        for key, name in self.identity.items():
            if self.header.get(key) != header.get(key):
                raise UserError(
                    f"{self.path} holds records of another {name} ({_short(self.header.get(key))}, "
                    f"this is {_short(header.get(key))}); give another --records, or begin anew with --fresh"
                )

    def _is_ours(self, data: bytes) -> bool:
        """Whether the file begins as ours do; it may be torn in its first line."""
        return data.startswith(f'{{"format":"{self.format_name}"'.encode()[: len(data)])


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
