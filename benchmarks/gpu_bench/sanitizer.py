"""compute-sanitizer on an artifact: every kernel of a short generation, by graph and without."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2_tvm.artifact import open_artifact, read_manifest
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import prompt_of
from gpu_bench.crew import Clock
from gpu_bench.pieces import Piece, complaints, origin, without_weights, work_through
from gpu_bench.runs import Row, save

SANITIZER_S = 240.0
MANY = 322  # tokens of each prompt, at the largest batch


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or where CUDA's installer puts it."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitizer_part(paths: Sequence[Path], tools: Sequence[str], limit_s: float, results: Path) -> list[str]:
    """Run `exercise` of each artifact under each tool; a row each, kept where it was clean."""
    clock = Clock(limit_s)
    file = results / "sanitizer.json"
    program = find_sanitizer()
    if program is None:
        missing = "compute-sanitizer is not on PATH, so it was not run (it comes with the CUDA toolkit)"
        save(file, {"rows": [], "missing": missing, "complete": False})
        return []

    def piece(path: Path, tool: str) -> Piece:
        about = origin(path, "cuda", ("sanitizer",), tool=tool)

        def run(left: float) -> Row:
            end = time.monotonic() + left
            if why := without_weights(path, left):
                return {"ok": False, "summary": "", **why}
            return sanitized(program, tool, path, min(SANITIZER_S, max(1.0, end - time.monotonic())))

        return Piece(about, run)

    pieces = [piece(path, tool) for path in paths for tool in tools]
    return complaints(work_through(file, pieces, clock), pieces)


def sanitized(program: str, tool: str, path: Path, limit_s: float) -> Row:
    """One run: `ok`, and the tool's own summary. Its whole process group is ended after `limit_s`."""
    code = f"from gpu_bench.sanitizer import exercise; exercise({str(path)!r})"
    command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    start = time.monotonic()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return {"ok": False, "failure": "timeout", "message": f"not done within {limit_s:.0f} s", "summary": ""}
    summary = next((line.strip("= \n") for line in reversed(output.splitlines()) if "SUMMARY" in line), "")
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    row: Row = {"ok": child.returncode == 0, "summary": summary, "seconds": time.monotonic() - start}
    failure = {0: "", 86: "error"}.get(child.returncode, "crash")
    return {**row, "failure": failure, "message": "" if row["ok"] else summary or last}


def exercise(path: str) -> None:
    """What runs under compute-sanitizer: every kernel of a short generation, by graph and without, and those of a
    prefill of many rows."""
    from gpt2_tvm.engine import Engine

    engine = Engine(path, None, verify=False)
    graphs = getattr(engine.runner, "graphs", None)
    artifact = open_artifact(path, verify=False)
    ids = prompt_of(artifact, Case(1, min(33, engine.max_seq_len // 2), 4))
    for enabled in (False, True) if graphs is not None else (False,):
        if graphs is not None:
            graphs.enabled = enabled
        engine.reset()
        engine.prefill(ids)
        engine.decode(int(ids[0, 0]))
        engine.decode_greedy(4)
    engine.reset()
    engine.prefill(prompt_of(artifact, Case(max(artifact.batch_sizes), min(MANY, engine.max_seq_len - 1), 1)))
    engine.runner.sync()
    if graphs is not None and graphs.refused:
        raise RuntimeError(f"no CUDA graph: {graphs.refused}")
    print("generated", read_manifest(Path(path))["model"], file=sys.stderr)
