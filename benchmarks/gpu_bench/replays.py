"""Many replays of the decode graph: memory must not grow, and the ids must be those of plain launches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import prompt_of
from gpu_bench.crew import Clock
from gpu_bench.pieces import Piece, complaints, in_its_process, origin, work_through
from gpu_bench.runs import Row

GROWTH_MB = 16.0  # of the process's memory, over all replays: Python's own


def replays_part(paths: Sequence[Path], count: int, device: str, limit_s: float, results: Path) -> list[str]:
    """See `replays_of`."""
    clock = Clock(limit_s)

    def piece(path: Path) -> Piece:
        about = origin(path, device, ("replays",), asked=[count])
        return Piece(about, lambda left: in_its_process(path, left, replays_of, device, count))

    pieces = list(map(piece, paths))
    return complaints(work_through(results / "replays.json", pieces, clock), pieces)


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
