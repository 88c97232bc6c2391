"""A program that ends when the process that wanted it ends, however that happens.

`start` runs it beneath a small process that waits for the end of its own standard input: that comes when the asking
process closes it, exits, crashes or is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STOP_S = 5.0  # for a program that is asked to end


def start(
    command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run `command`, its output in `log`; returns the process above it, which ends when the program does.

    folder: removed at the end. Close the process's standard input to end the program.
    """
    asked = {"command": list(command), "folder": str(folder), "log": str(log)}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        start_new_session=True,  # Ctrl-C goes to the asking process, which decides
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    process.stdin.flush()
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """End what `start` returned, and wait for it."""
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(2 * STOP_S)
    if process.poll() is None:
        process.kill()
        process.wait()


def end(program: subprocess.Popen[bytes]) -> None:
    """Ask a program to end, and make it end where it does not."""
    program.terminate()
    with suppress(subprocess.TimeoutExpired):
        program.wait(STOP_S)
    if program.poll() is None:
        program.kill()
        program.wait()


def main() -> None:
    """Reads one line of JSON (command, folder, log) from standard input, then waits for the input's end."""
    asked = json.loads(sys.stdin.readline())
    with Path(asked["log"]).open("wb") as log:
        program = subprocess.Popen(asked["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_for_the_end() -> None:
        sys.stdin.read()
        end(program)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    status = program.wait()
    shutil.rmtree(asked["folder"], ignore_errors=True)
    os._exit(0 if status == 0 else 1)  # the thread above may still read


if __name__ == "__main__":
    main()
