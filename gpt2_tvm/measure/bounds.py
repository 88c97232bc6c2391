"""What a decode step cannot be faster than: the bytes it must read over the memory's bandwidth."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.weights import EMBEDDING, expected_tensors

POSITIONS = "transformer.wpe.weight"
PROBE_BYTES = 256 << 20  # far more than a cache holds
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def artifact_param_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of each parameter as the artifact stores it, padding of its layout included."""
    from gpt2_tvm.measure.peers import stored_records

    return {record["name"]: int(record["nbytes"]) for _, record in stored_records(artifact)}


def float32_param_bytes(config: GPT2Config) -> dict[str, int]:
    """Bytes of each parameter in plain float32."""
    return {name: 4 * prod(shape) for name, shape in expected_tensors(config).items()}


def decode_step_bytes(config: GPT2Config, param_bytes: Mapping[str, int], cache_dtype: str, case: Case) -> float:
    """Bytes that a decode step must read at the least, the mean over a case's steps.

    Every parameter once, whatever the batch, except the position table and the token table, of which a step
    reads a row a sequence (left out: it is a millionth). A tied head is the token table, which then counts
    once. Of the KV cache, the step at position p reads the keys and values of p + 1 tokens in each layer and
    sequence; over the case, that is prompt_tokens + (generate_tokens + 1) / 2 of them.
    """
    rows_only = {POSITIONS} if config.tie_word_embeddings else {POSITIONS, EMBEDDING}
    weights = sum(size for name, size in param_bytes.items() if name not in rows_only)
    cached = case.prompt_tokens + (case.generate_tokens + 1) / 2
    a_token = 2 * config.n_layer * config.n_embd * _ITEM_BYTES[cache_dtype]
    return weights + case.batch * cached * a_token


@dataclass(frozen=True)
class Bandwidth:
    """A memory's read rate in 10^9 bytes a second, and in words where the figure comes from."""

    gb_s: float
    source: str


def target_bandwidth(artifact: Artifact) -> Bandwidth | None:
    """The peak that the target's file states, if it does."""
    peak = artifact.manifest["target"].get("peak") or {}
    rate = peak.get("bandwidth_gb_s")
    return Bandwidth(float(rate), f"peak of target {artifact.manifest['target']['name']}") if rate else None


def measure_read_bandwidth(repeats: int = 5, nbytes: int = PROBE_BYTES) -> Bandwidth:
    """How fast all cores together read memory here: the best of `repeats`.

    Each thread adds up its part of `nbytes` of int64 with `np.add.reduce`, outside Python's lock. Integers,
    because numpy adds them with full vectors; its pairwise sum of floats reaches half of that.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    threads = len(allowed(0)) if allowed else os.cpu_count() or 1
    parts = np.array_split(np.ones(max(nbytes // 8, threads), np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.add.reduce, parts))  # threads exist, pages are there
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = min(best, time.perf_counter() - start)
    size = sum(part.nbytes for part in parts)
    note = f"measured: sum of {size >> 20} MiB of integers, {threads} threads, best of {repeats}"
    return Bandwidth(size / best / 1e9, note)
