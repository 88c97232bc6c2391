"""What an engine cannot be faster than: a decode step the bytes it must read over the memory's bandwidth, a prefill its
multiply-adds over the rate of the arithmetic units."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from statistics import median

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.measure import loops
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.weights import EMBEDDING, expected_tensors

POSITIONS = "transformer.wpe.weight"
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def artifact_param_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of each parameter as the artifact stores it, padding of its layout included."""
    from gpt2_tvm.measure.peers import stored_records

    return {record["name"]: int(record["nbytes"]) for _, record in stored_records(artifact)}


def plain_param_bytes(config: GPT2Config, dtype: str = "float32") -> dict[str, int]:
    """Bytes of each parameter in one dtype, without padding."""
    return {name: _ITEM_BYTES[dtype] * prod(shape) for name, shape in expected_tensors(config).items()}


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
    a_token = 2 * _channels(config) * _ITEM_BYTES[cache_dtype]
    return weights + case.batch * cached * a_token


def prefill_flops(config: GPT2Config, case: Case) -> int:
    """Floating-point operations of the multiply-adds that a prefill from an empty cache cannot do without.

    Two for each weight of a layer's matrices and token, two for each weight of the head and sequence (the logits after
    the last token alone), and in each layer four for each channel and each pair of a token with one that it sees.
    """
    n, width = case.prompt_tokens, config.n_embd
    matrices = sum(
        prod(shape)
        for name, shape in expected_tensors(config).items()
        if name.startswith("transformer.h.") and len(shape) == 2
    )
    pairs = n * (n + 1) // 2
    sequence = 2 * n * matrices + 2 * config.vocab_size * width + 4 * _channels(config) * pairs
    return case.batch * sequence


def _channels(config: GPT2Config) -> int:
    """Channels of the heads of all layers together: n_layer * n_embd, unless heads were pruned."""
    return config.head_dim * sum(config.heads(layer) for layer in range(config.n_layer))


@dataclass(frozen=True)
class Bandwidth:
    """A memory's read rate in 10^9 bytes a second, and in words where the figure comes from."""

    gb_s: float
    source: str
    gb_s_sd: float = 0.0


@dataclass(frozen=True)
class Arithmetic:
    """The rate of multiply-adds in 10^9 floating-point operations a second (two each), and where the figure is from."""

    gflop_s: float
    source: str
    gflop_s_sd: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """What an engine is held against; None where nobody knows."""

    bandwidth: Bandwidth | None = None
    arithmetic: Arithmetic | None = None


def target_bounds(artifact: Artifact) -> Bounds:
    """The peaks that the target's file states, where it does: bandwidth, and FLOP/s at the artifact's precision."""
    manifest = artifact.manifest
    peak, name = manifest["target"].get("peak") or {}, manifest["target"]["name"]
    rate = peak.get("bandwidth_gb_s")
    compute = peak.get("fp32_tflops" if manifest["compute_dtype"] == "float32" else "fp16_tflops")
    return Bounds(
        Bandwidth(float(rate), f"peak of target {name}") if rate else None,
        Arithmetic(1e3 * float(compute), f"peak of target {name}") if compute else None,
    )


def measure_read_bandwidth(threads: int, repeats: int = 5, nbytes: int = loops.READ_BYTES) -> float:
    """How fast `threads` threads together read memory here, in 10^9 bytes a second: the median of `repeats` passes
    over `nbytes`, after one that does not count. With TVM's compiler by a loop of its own, else by numpy."""
    return _median_rate(read_loop(threads, nbytes), repeats)


def measure_fma_rate(threads: int, repeats: int = 5) -> float:
    """How fast `threads` threads together multiply and add on registers alone, in 10^9 float32 operations a second
    (two a multiply-add): the median of `repeats`. Needs TVM's compiler."""
    return _median_rate(loops.fma_loop(threads), repeats)


def _median_rate(loop: loops.Loop, repeats: int) -> float:
    loop.run()
    return median(loop.rate() for _ in range(repeats))


def read_loop(threads: int, nbytes: int = loops.READ_BYTES) -> loops.Loop:
    """The fastest reader to be had here: TVM's, or numpy's where there is no compiler."""
    return loops.read_loop(threads, nbytes) if loops.can_compile() else numpy_read_loop(threads, nbytes)


def numpy_read_loop(threads: int, nbytes: int = loops.READ_BYTES) -> loops.Loop:
    """What reads memory where there is no compiler: `np.add.reduce` of int64 on Python threads, outside Python's lock.

    Integers, because numpy adds them with full vectors; its pairwise sum of floats reaches half of that.
    """
    parts = np.array_split(np.ones(max(nbytes // 8, threads), np.int64), threads)
    pool = ThreadPoolExecutor(threads)
    return loops.Loop(lambda: list(pool.map(np.add.reduce, parts)), float(sum(part.nbytes for part in parts)))
