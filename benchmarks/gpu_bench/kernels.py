"""Kernels alone: the LM head beside the copy bandwidth, each product of a prefill beside cuBLAS."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import prompt_of
from gpu_bench.crew import Clock
from gpu_bench.pieces import Piece, complaints, in_its_process, origin, work_through
from gpu_bench.runs import Row, read

COPIES = 8  # of the LM head's weights, used in turn: none is in a cache when it is read again
HEAD_SHARE = 0.85  # of the copy bandwidth, what the LM head is to reach
PRODUCT = re.compile(r"attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj")


def kernels_part(
    paths: Sequence[Path],
    batches: Sequence[int],
    prompt_tokens: int,
    repeats: int,
    device: str,
    limit_s: float,
    results: Path,
) -> list[str]:
    """See `kernels_of`."""
    clock = Clock(limit_s)
    copy = (read(results / "machine.json") or {}).get("copy_gb_s")
    asked = [list(batches), prompt_tokens, repeats, copy]

    def piece(path: Path) -> Piece:
        about = origin(path, device, ("kernels",), asked=asked)
        return Piece(about, lambda left: in_its_process(path, left, kernels_of, device, *asked))

    pieces = list(map(piece, paths))
    return complaints(work_through(results / "kernels.json", pieces, clock), pieces)


def kernels_of(
    path: Path, device: str, batches: Sequence[int], prompt_tokens: int, repeats: int, copy_gb_s: float | None
) -> Row:
    """The LM head's product of one decode step, from weights in no cache, beside the copy bandwidth; and each product
    of a prefill of each of `batches` that the artifact has, with what is fused into it, beside torch's product alone
    (cuBLAS on a GPU), both again and again on the same weights.

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

    products = []
    for batch in sorted(set(batches) & set(engine.artifact.batch_sizes)):
        engine.reset()
        ids = prompt_of(engine.artifact, Case(batch, length, 1))
        steps = recorded(engine, "prefill", lambda ids=ids: engine.prefill(ids))  # type: ignore[misc]
        for name, run, arguments in {s[0]: s for s in steps}.values():
            if (found := PRODUCT.search(roles[name])) is not None:
                m, (n, k) = batch * length, shape_of(found[0], engine.config)
                ours = timed([lambda: run(*arguments)])  # noqa: B023 - called within this turn of the loop
                theirs = timed([torchs_product(m, n, k, manifest["compute_dtype"], device)])
                products.append(
                    {"product": found[0], "function": name, "m": m, "n": n, "k": k, "us": 1e6 * ours}
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
