"""What the project asks of its CPU engine, line by line, beside what a run reached.

Targets are ratios and shares, so a run on any machine can be judged. A line whose engines did not run is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
PHASES = ("decode", "prefill")
MEMORY_SLACK_MB = 50.0  # beside weights and KV cache, over a bare `import tvm`
LOAD_S = 1.0  # to open an artifact that the system has in memory


@dataclass(frozen=True)
class Against:
    """Our rate over a peer's, one sequence. peers: their names; empty: all of that precision, the best counts.
    target None: a mark to aim at, neither met nor missed."""

    precision: str
    peers: tuple[str, ...]
    words: str
    decode: float | None
    prefill: float | None


@dataclass(frozen=True)
class Share:
    """A share of the machine's bound: `key` of our row."""

    phase: str
    key: str
    words: str
    target: float


RATIOS = (
    Against("float32", (), "the best float32 peer", 1.05, 1.0),
    Against("float16", ("llama-f16",), "llama.cpp f16", 1.05, 1.0),
    Against("int8", ("llama-q8_0",), "llama.cpp q8_0", 1.05, 1.0),
    Against("int8", ("ct2-int8",), "CTranslate2 int8, a mark to aim at", None, None),
)
SHARES = (
    Share("decode", "read_share", "the measured read bandwidth", 0.85),
    Share("prefill", "fma_share", "the measured FMA rate", 0.60),
)
BATCH_DECODE = 1.0  # of more than one sequence, over the best peer of each precision


def judge(rows: Sequence[Row], bounds: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """`report` rows -> lines with `line`, `target` (words), `reached` and `reached_sd` (a ratio, a share, or MB),
    `against` (the peer that it was measured by), and `met` (None: no target)."""
    cases = list(dict.fromkeys((r["batch"], r["prompt_tokens"], r["generate_tokens"]) for r in rows))
    return [line for case in cases for line in _judge([r for r in rows if _case(r) == case], case[0], bounds)]


def _case(row: Row) -> tuple[int, int, int]:
    return row["batch"], row["prompt_tokens"], row["generate_tokens"]


def _judge(rows: Sequence[Row], batch: int, bounds: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    where = f"batch {batch}"
    if batch > 1:
        for precision in dict.fromkeys(r["precision"] for r in rows):
            best = _hardest(rows, precision, (), "decode")
            if best is not None:
                words = f"the best {precision} peer"
                yield _ratio(f"{where}, {precision} decode", words, BATCH_DECODE, best, "decode")
        return
    for ask in RATIOS:
        for phase, target in zip(PHASES, (ask.decode, ask.prefill), strict=True):
            best = _hardest(rows, ask.precision, ask.peers, phase)
            if best is not None:
                yield _ratio(f"{where}, {ask.precision} {phase}", ask.words, target, best, phase)
    ours = next((r for r in rows if r["scheme"] and r["precision"] == "float32" and r["decode_tok_s"]), None)
    if ours is None or bounds is None:
        return
    for share in SHARES:
        if ours[share.key] is None:
            continue
        yield {
            "line": f"{where}, float32 {share.phase}",
            "target": f">= {100 * share.target:.0f} % of {share.words}",
            "reached": ours[share.key],
            "reached_sd": None,
            "against": None,
            "met": ours[share.key] >= share.target,
        }
    over = ours["peak_rss_mb"] - bounds["import_rss_mb"]
    allowed = ours["weights_mb"] + ours["cache_mb"] + MEMORY_SLACK_MB
    yield {
        "line": f"{where}, float32 memory over a bare import tvm, MB",
        "target": f"<= weights + KV cache + {MEMORY_SLACK_MB:.0f} = {allowed:.0f}",
        "reached": over,
        "reached_sd": None,
        "against": None,
        "met": over <= allowed,
    }
    if ours["load_s"] is not None:
        yield {
            "line": f"{where}, float32 loading, s",
            "target": f"< {LOAD_S:g}, checksums included",
            "reached": ours["load_s"],
            "reached_sd": None,
            "against": None,
            "met": ours["load_s"] < LOAD_S,
        }


def _hardest(rows: Sequence[Row], precision: str, peers: tuple[str, ...], phase: str) -> Row | None:
    """The peer's row over which our ratio is the smallest."""
    found = [r for r in rows if r["precision"] == precision and r[f"{phase}_ratio"] is not None]
    found = [r for r in found if not peers or r["engine"] in peers]
    return min(found, key=lambda r: r[f"{phase}_ratio"], default=None)


def _ratio(line: str, words: str, target: float | None, row: Row, phase: str) -> dict[str, Any]:
    reached = row[f"{phase}_ratio"]
    return {
        "line": line,
        "target": words if target is None else f">= {target:g} x {words}",
        "reached": reached,
        "reached_sd": row[f"{phase}_ratio_sd"],
        "against": row["engine"],
        "met": None if target is None else reached >= target,
    }
