"""Parts beside the timed ones: kernels alone, many replays, compute-sanitizer. Each ends in time and can run alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gpt2_tvm.artifact import open_artifact, read_manifest
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import prompt_of
from gpu_bench.crew import Clock, OutOfTimeError, alone
from gpu_bench.runs import Entry, Row, code_of, machine_key, read, save
from gpu_bench.weights import fill, has_weights

COPIES = 8  # of the LM head's weights, used in turn: none is in a cache when it is read again
HEAD_SHARE = 0.85  # of the copy bandwidth, what the LM head is to reach
GROWTH_MB = 16.0  # of the process's memory, over all replays: Python's own
SANITIZER_S = 240.0
PRODUCT = re.compile(r"attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj")


def each_artifact(
    part: str,
    paths: Sequence[Path],
    device: str,
    limit_s: float,
    results: Path,
    function: Callable[..., Any],
    *arguments: Any,
) -> list[str]:
    """Call `function(path, *arguments)`, which gives a row, for each artifact in a process of its own; rows that are
    there and right are kept. Returns what failed, a line each."""
    file, clock, here = results / f"{part}.json", Clock(limit_s), machine_key(device)
    rows: dict[str, Row] = {row["artifact"]: row for row in (read(file) or {}).get("rows", ())}
    lines = []
    for i, path in enumerate(paths):
        about: Row = {"artifact": path.name, "code": code_of(Entry(path, "ours", "graph")), "machine": here}
        about["asked"] = [str(a) for a in arguments if not isinstance(a, Path)]
        row = rows.get(path.name)
        if row is not None and row["ok"] and all(row.get(key) == value for key, value in about.items()):
            continue
        try:
            clock.begin(f"{part}: {path.name}")
        except OutOfTimeError:
            lines.append(f"no time for {', '.join(p.name for p in paths[i:])}; the same command goes on from here")
            break
        why: dict[str, str] = {}
        found: Any = None
        if not has_weights(path):
            _, why = alone(f"weights of {path.name}", max(1.0, clock.left), fill, path)
        if not why:
            found, why = alone(path.name, max(1.0, clock.left), function, path, *arguments)
        rows[path.name] = {**(found or {}), **({"ok": False, **why} if why else {}), **about}
        if not rows[path.name]["ok"]:
            lines.append(f"{path.name}: {rows[path.name].get('message') or 'not what it should be, see the table'}")
        save(file, {"rows": list(rows.values()), "complete": not lines})
    return lines


# ---- kernels


def kernels_part(
    paths: Sequence[Path], prompt_tokens: int, repeats: int, device: str, limit_s: float, results: Path
) -> list[str]:
    """See `kernels_of`."""
    machine = read(results / "machine.json") or {}
    copy = machine.get("copy_gb_s")
    return each_artifact("kernels", paths, device, limit_s, results, kernels_of, device, prompt_tokens, repeats, copy)


def kernels_of(path: Path, device: str, prompt_tokens: int, repeats: int, copy_gb_s: float | None) -> Row:
    """The LM head's product of one decode step, from weights in no cache, beside the copy bandwidth; and each product
    of a prefill, with what is fused into it, beside torch's product alone (cuBLAS on a GPU), both again and again on
    the same weights.

    head: us, gb_s (all that it reads and writes, once), share (of the copy, None where that was not measured) ·
    products: product, m, n, k, us, torch_us, ratio (torch's time over ours). `ok`: that all of it was measured; whether
    the head reaches `HEAD_SHARE` is for the table to say.
    """
    from gpt2_tvm.engine import Engine

    engine = Engine(path, None, verify=False)
    manifest = engine.artifact.manifest
    roles = {row["name"]: row["role"] for row in manifest["functions"]}
    length = min(prompt_tokens, engine.max_seq_len - 1)
    ids = prompt_of(engine.artifact, Case(1, length, 1))
    timed = timer(device, repeats)

    step = recorded(engine, "decode_b1", lambda: (engine.prefill(ids), engine.decode(int(ids[0, -1]))))
    _, run, arguments = next(s for s in reversed(step) if "logits" in roles[s[0]])
    weight = max(range(len(arguments)), key=lambda i: nbytes(arguments[i]))
    variants = []
    for _ in range(COPIES):
        copy = engine.runner.empty(arguments[weight].shape, str(arguments[weight].dtype))
        copy.copyfrom(arguments[weight])
        variants.append((*arguments[:weight], copy, *arguments[weight + 1 :]))
    seconds = timed([lambda v=v: run(*v) for v in variants])  # type: ignore[misc]
    gb_s = sum(map(nbytes, arguments)) / seconds / 1e9
    head = {"us": 1e6 * seconds, "gb_s": gb_s, "share": gb_s / copy_gb_s if copy_gb_s else None, "wanted": HEAD_SHARE}
    del variants

    engine.reset()
    steps = recorded(engine, "prefill", lambda: engine.prefill(ids))
    products = []
    for name, run, arguments in {s[0]: s for s in steps}.values():
        if (found := PRODUCT.search(roles[name])) is not None:
            n, k = shape_of(found[0], engine.config)
            ours = timed([lambda: run(*arguments)])  # noqa: B023 - called within this turn of the loop
            theirs = timed([torchs_product(length, n, k, manifest["compute_dtype"], device)])
            products.append(
                {"product": found[0], "function": name, "m": length, "n": n, "k": k, "us": 1e6 * ours}
                | {"torch_us": 1e6 * theirs, "ratio": theirs / ours}
            )
    return {"head": head, "products": products, "ok": bool(products), "message": "" if products else "no product found"}


def recorded(engine: Any, function: str, act: Callable[[], Any]) -> list[tuple[str, Callable[..., Any], tuple]]:
    """The compiled functions that the last call of `function` within `act` consists of: (name, function, arguments)."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    runner, calls = engine.runner, []
    original = runner.call

    def call(name: str, inputs: Sequence[Any], with_params: bool = True) -> Any:
        calls.append((name, list(inputs)))
        return original(name, inputs, with_params)

    runner.call = call
    try:
        act()
    finally:
        del runner.call  # the class's own again
    inputs = next(inputs for name, inputs in reversed(calls) if name == function)
    names = {row["name"] for row in engine.artifact.manifest["functions"]}
    machine = VirtualMachine(tvm.runtime.load_module(str(engine.artifact.library)), runner.device)
    steps: list[tuple[str, Callable[..., Any], tuple]] = []

    def see(run: Any, name: str, before: bool, _: Any, *arguments: Any) -> int:
        if before and name in names:
            steps.append((name, run, arguments))
        return 0  # go on

    machine.set_instrument(see)
    machine[function](*(tvm.runtime.convert(x) if isinstance(x, list) else x for x in inputs), runner.params)
    runner.sync()
    return steps


def timer(device: str, repeats: int) -> Callable[[Sequence[Callable[[], Any]]], float]:
    """What times calls in a row -> seconds of one, the median. On a GPU by events on the default stream, which torch
    and TVM share, behind enough work that the host is never waited for."""
    import torch

    def timed(calls: Sequence[Callable[[], Any]]) -> float:
        calls = [*calls] * max(1, COPIES // len(calls))
        for call in calls:
            call()
        found = []
        for _ in range(repeats):
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(10_000_000)  # cycles, 5 ms: until then the host has queued the calls
                begin.record()
                for call in calls:
                    call()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end) / 1e3 / len(calls))
            else:
                start = time.perf_counter()
                for call in calls:
                    call()
                found.append((time.perf_counter() - start) / len(calls))
        return median(found)

    return timed


def torchs_product(m: int, n: int, k: int, dtype: str, device: str) -> Callable[[], Any]:
    """x [m, k] times w [n, k], transposed, as a linear layer has it; float32 in full precision, no TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    kind = {"float16": torch.float16, "float32": torch.float32}[dtype]
    x, w = (torch.randn(rows, k, device=device).to(kind) for rows in (m, n))
    out = torch.empty(m, n, device=device, dtype=kind)
    return lambda: torch.matmul(x, w.T, out=out)


def shape_of(product: str, config: Any) -> tuple[int, int]:
    """(n, k) of a product: what it makes of each token, and of how much."""
    E, inner = config.n_embd, config.n_inner
    return {"attn.c_attn": (3 * E, E), "attn.c_proj": (E, E), "mlp.c_fc": (inner, E), "mlp.c_proj": (E, inner)}[product]


def nbytes(tensor: Any) -> int:
    """Of an argument; 0 for a number."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        return 0
    return int(np.prod([int(x) for x in shape], dtype=np.int64)) * np.dtype(str(tensor.dtype)).itemsize


# ---- replays


def replays_part(paths: Sequence[Path], count: int, device: str, limit_s: float, results: Path) -> list[str]:
    """See `replays_of`."""
    return each_artifact("replays", paths, device, limit_s, results, replays_of, device, count)


def replays_of(path: Path, device: str, count: int) -> Row:
    """Decode `count` tokens by graph, in stretches that the context holds: the ids of each are compared with those of
    plain launches, and memory after the first tenth with memory at the end."""
    from gpt2_tvm.engine import Engine

    engine = Engine(path, None, verify=False)
    graphs = getattr(engine.runner, "graphs", None)
    length = min(64, engine.max_seq_len // 2)
    stretch = min(count, engine.max_seq_len - length)
    ids = prompt_of(engine.artifact, Case(1, length, stretch))

    def decode(graphed: bool) -> list[int]:
        if graphs is not None:
            graphs.enabled = graphed
        engine.reset()
        engine.prefill(ids)
        return list(engine.decode_greedy(stretch)[0].tolist())

    wanted, done, different = decode(False), 0, 0
    before: tuple[float, float] | None = None
    counted = graphs.replays if graphs is not None else 0
    while done < count:
        different += decode(True) != wanted
        done += stretch
        if before is None and done >= count / 10:
            before = memory_mb(device)
    after = memory_mb(device)
    start = before or after
    replayed = graphs.replays - counted if graphs is not None else 0
    row = {"tokens": done, "replays": replayed, "stretches_with_other_ids": different}
    row |= {"gpu_growth_mb": after[0] - start[0], "host_growth_mb": after[1] - start[1]}
    refused = graphs.refused if graphs is not None else ""
    lacking = graphs is not None and replayed < 0.9 * count  # the first of each stretch may be captured anew
    still = row["gpu_growth_mb"] <= 1.0 and row["host_growth_mb"] <= GROWTH_MB
    return {**row, "refused": refused, "ok": not different and still and not refused and not lacking}


def memory_mb(device: str) -> tuple[float, float]:
    """(in use on the GPU, of all its processes; resident of this process) in 10^6 bytes."""
    used = 0.0
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        used = (total - free) / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return used, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- compute-sanitizer


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or where CUDA's installer puts it."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitizer_part(paths: Sequence[Path], tools: Sequence[str], limit_s: float, results: Path) -> list[str]:
    """Run `exercise` of each artifact under each tool; a row each, kept where it was clean."""
    file, clock, here = results / "sanitizer.json", Clock(limit_s), machine_key("cuda")
    program = find_sanitizer()
    if program is None:
        missing = "compute-sanitizer is not on PATH, so it was not run (it comes with the CUDA toolkit)"
        save(file, {"rows": [], "missing": missing, "complete": False})
        return []
    rows = {(row["artifact"], row["tool"]): row for row in (read(file) or {}).get("rows", ())}
    lines = []
    for path in paths:
        for tool in tools:
            about = {"artifact": path.name, "tool": tool, "machine": here}
            about["code"] = code_of(Entry(path, "ours", "graph"))
            row = rows.get((path.name, tool))
            if row is not None and row["ok"] and all(row.get(key) == value for key, value in about.items()):
                continue
            try:
                clock.begin(f"{tool}: {path.name}")
            except OutOfTimeError:
                lines.append(f"no time for {tool} of {path.name}; the same command goes on from here")
                continue
            row = {**sanitized(program, tool, path, max(1.0, min(SANITIZER_S, clock.left))), **about}
            rows[path.name, tool] = row
            if not row["ok"]:
                lines.append(f"{tool} of {path.name}: {row['failure']}, {row['message']}")
            save(file, {"rows": list(rows.values()), "complete": not lines})
    return lines


def sanitized(program: str, tool: str, path: Path, limit_s: float) -> Row:
    """One run: `ok`, and the tool's own summary. Its whole process group is ended after `limit_s`."""
    code = f"from gpu_bench.extra import exercise; exercise({str(path)!r})"
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
    """What runs under compute-sanitizer: every kernel of a short generation, by graph and without."""
    from gpt2_tvm.engine import Engine

    engine = Engine(path, None, verify=False)
    graphs = getattr(engine.runner, "graphs", None)
    ids = prompt_of(open_artifact(path, verify=False), Case(1, min(33, engine.max_seq_len // 2), 4))
    for enabled in (False, True) if graphs is not None else (False,):
        if graphs is not None:
            graphs.enabled = enabled
        engine.reset()
        engine.prefill(ids)
        engine.decode(int(ids[0, 0]))
        engine.decode_greedy(4)
    engine.runner.sync()
    if graphs is not None and graphs.refused:
        raise RuntimeError(f"no CUDA graph: {graphs.refused}")
    print("generated", read_manifest(Path(path))["model"], file=sys.stderr)
