"""What all command lines share: one-line errors, exit codes, and no traceback unless asked for."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from gpt2_tvm.errors import UserError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def describe(error: BaseException) -> str:
    """One line for `error`, with its mend where we know one."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"the disk is full{where}; free some space and run the same command again"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission to write or read{where}; choose another folder with --output, or change its permissions"
        return f"{error.strerror or error}{where}"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, batch or --max-seq-len, or close other programs"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (unexpected: run again with GPT2_TVM_DEBUG=1 for the traceback)"


def run(main: Callable[[], Any]) -> None:
    """Run a typer app (or any callable) and turn its errors into one line on stderr and an exit status."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if os.environ.get("GPT2_TVM_DEBUG"):
            raise
        print(f"error: {' '.join(describe(error).split())}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
