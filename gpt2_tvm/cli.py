"""What all command lines share: one-line errors, exit codes, and no traceback unless asked for."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SIGNAL = 128  # plus the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM


def describe(error: BaseException) -> str:
    """One line for `error`, with its mend where we know one."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full{where}; free some space and run the same command again"
        if error.errno == errno.EFBIG:
            return f"a file would be larger than this system allows{where}; raise the limit (ulimit -f)"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"no permission to write or read{where}; choose another folder with --output, or change its permissions"
            )
        return f"{error.strerror or error}{where}"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, batch or --max-seq-len, or close other programs"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (unexpected: run again with GPT2_TVM_DEBUG=1 for the traceback)"


def run(main: Callable[[], Any]) -> None:
    """Run a typer app (or any callable) and turn its errors into one line on stderr and an exit status.

    Status 1 for an error, 2 for a command line that is not understood. SIGINT and SIGTERM unwind the program, so that
    what was half-written is removed, and then decide the status, whatever the exception has become on its way through
    other people's code.
    """
    import typer

    with _signals() as received:
        status: Any = EXIT_ERROR
        try:
            # outside its "standalone mode" typer leaves errors to us, and returns the status of --help and typer.Exit
            status = main(standalone_mode=False) if isinstance(main, typer.Typer) else main()
        except (KeyboardInterrupt, SystemExit):
            if not received:
                raise
        except Exception as error:
            if not received:
                status = _report(error)
        if received:
            what = "interrupted" if received[0] == signal.SIGINT else "terminated"
            print(f"{what}; nothing half-written was left behind", file=sys.stderr)
            sys.exit(EXIT_SIGNAL + received[0])
        if isinstance(status, int) and status:
            sys.exit(status)


def _report(error: Exception) -> int:
    """Print the one line; returns the exit status."""
    if os.environ.get("GPT2_TVM_DEBUG"):
        raise error
    usage = getattr(error, "format_message", None)  # click's, which typer may carry a copy of
    text = f"{usage().rstrip('.')}; see --help" if usage else describe(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_USAGE if usage else EXIT_ERROR


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt in here; the list holds their numbers as they come."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers from there alone
        yield received
        return

    def handler(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def integers(text: str, option: str) -> tuple[int, ...]:
    """A comma list of integers, as options such as --batch-sizes take it."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option} {text}: give integers with commas between, such as 1,4") from None


def check_writable(option: str, file: Path) -> None:
    """Refuse now what could not be written after minutes of work. option: what the user calls it, such as --json."""
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {file} cannot be written there; choose a file in a folder of yours")


@contextmanager
def progress(turns: int) -> Iterator[Callable[[str, int], Any]]:
    """A bar on stderr while the block runs; on what is no terminal, a line where what stands before the colon changes.

    turns: how many there are. Yields a function to call with (what comes next, turns done).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_a_stage()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=turns)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _line_a_stage() -> Callable[[str, int], Any]:
    last = ""

    def say(what: str, done: int) -> None:
        nonlocal last
        stage = what.partition(":")[0]
        if stage != last:
            print(stage, file=sys.stderr, flush=True)
        last = stage

    return say


@contextmanager
def kept_if_interrupted(json_file: Path | None, result: Callable[[], Any]) -> Iterator[None]:
    """Around a long measurement: Ctrl-C writes what `result()` is by then where --json says, and goes on its way."""
    try:
        yield
    except KeyboardInterrupt:
        if json_file is not None:
            write_json(json_file, result())
            print(f"what was measured so far is in {json_file}", file=sys.stderr)
        raise


def conclude(
    text: str,
    result: Any,
    json_file: Path | None,
    draw: Callable[[], Any] | None = None,
    failures: Sequence[str] = (),
) -> None:
    """The end of a command that measured: print `text`, write `result` where --json says, draw, and only then fail.

    In this order: a disk that is full now must not cost the figures, nor one failure those of the others. UserError
    with all `failures`, where there are any.
    """
    sys.stdout.write(text)
    sys.stdout.flush()
    if json_file is not None:
        write_json(json_file, result)
    if draw is not None:
        draw()
    if failures:
        raise UserError("; ".join(failures))


def write_json(path: Path, value: Any) -> None:
    """Write `value` where --json says: beside it first, then renamed."""
    from gpt2_tvm.files import write_atomically

    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
