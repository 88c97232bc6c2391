"""A command line of ours run in this process: what a new interpreter would print, without its seconds of imports.

For what ends before anything long begins, above all errors. What a command does as a program (its imports, signals,
children) is tested with a process of its own, at least once for each command.
"""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from pytest import MonkeyPatch

from gpt2_tvm import cli


def run_here(
    module: str, *arguments: object, stdin: bytes = b"", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` in `folder`, through the `cli.run` that its last line calls.

    Errors that are not ours come out of `cli.run` as one line too, as they would there.
    """
    app = importlib.import_module(module).app
    line = [f"{module}.py", *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    status = 0
    before = Path.cwd()
    with MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", line)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        patch.delenv("GPT2_TVM_DEBUG", raising=False)
        os.chdir(folder or before)
        try:
            cli.run(app)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os.chdir(before)
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(line, status, *printed)
