"""The timed parts: who takes turns, within how many seconds, and what is written down."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.files import write_atomically
from gpt2_tvm.measure import bounds
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.results import agreeing, now, rates, spread
from gpt2_tvm.measure.timing import Samples, run_rounds
from gpt2_tvm.measure.workers import Worker


@dataclass(frozen=True)
class Entry:
    """Who takes part. engine: "ours" or "torch" · how: of ours "graph" or "plain", of torch a mode."""

    path: Path
    engine: str
    how: str

    @property
    def label(self) -> str:
        return f"{self.path.name}, {self.how}" if self.engine == "ours" else f"torch {self.how}"

    def worker(self, device: str, cases: Sequence[Case]) -> Worker:
        from gpu_bench import subjects

        if self.engine == "ours":
            graphs = {"graph": True, "plain": False}[self.how]
            return Worker(self.label, subjects.Ours, str(self.path), None, graphs, tuple(cases))
        return Worker(self.label, subjects.Torch, str(self.path), device, self.how, tuple(cases))


def find_artifacts(kit: Path, model: str | None = None, quantization: str | None = None) -> list[Path]:
    """The artifacts in `kit`/artifacts (or in `kit` itself, or `kit` alone), by name.

    Raises UserError where there are none of that model and quantization.
    """
    folder = kit / "artifacts" if (kit / "artifacts").is_dir() else kit
    found = (
        [folder] if (folder / "manifest.json").is_file() else sorted(p.parent for p in folder.glob("*/manifest.json"))
    )

    def wanted(path: Path) -> bool:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return (model is None or manifest["model"] == model) and (
            quantization is None or manifest["quantization"] == quantization
        )

    chosen = [path for path in found if wanted(path)]
    if not chosen:
        what = " ".join(filter(None, (model, quantization))) or "artifact"
        raise UserError(f"no {what} in {folder}; make a kit with python benchmarks/gpu.py pack-kit")
    return chosen


def has_graphs(path: Path) -> bool:
    return bool(json.loads((path / "manifest.json").read_text(encoding="utf-8")).get("cuda_graph"))


class OutOfTimeError(Exception):
    """The part's seconds are over; what was measured is written."""


def run_part(
    part: str,
    entries: Sequence[Entry],
    cases: Sequence[Case],
    repeats: int,
    limit_s: float,
    device: str,
    results: Path,
) -> dict[str, Any]:
    """Let `entries` take turns and write `results`/`part`.json after every case.

    Cases and entries that the file has already are left out, so the same command goes on where the last one ended.
    Stops by itself after `limit_s`: a child that is still at work then is ended, and "complete" is false.
    """
    file = results / f"{part}.json"
    machine = read(results / "machine.json")
    before = read(file) or {}
    rows = [row for row in before.get("rows", ())]
    done = {_key(row) for row in rows}
    result: dict[str, Any] = {"part": part, "complete": False, "failures": [], "rows": rows, "machine": machine}
    end = time.monotonic() + limit_s
    todo = {case: [e for e in entries if _key_of(e, case) not in done] for case in cases}
    try:
        for case, group in todo.items():
            if group:
                _say(f"{case.batch} x {case.prompt_tokens} + {case.generate_tokens}: {len(group)} engines")
                _one_case(group, case, repeats, end, device, result)
                save(file, result)
        result["complete"] = not result["failures"]
    except OutOfTimeError:
        _say(f"stopped after {limit_s:.0f} s; the same command goes on from here")
    save(file, result)
    return result


def _one_case(
    entries: Sequence[Entry], case: Case, repeats: int, end: float, device: str, result: dict[str, Any]
) -> None:
    samples: Samples = {}
    workers: list[Worker] = []
    alive: list[tuple[Entry, Worker]] = []

    def say(what: str, turns: int) -> None:
        if time.monotonic() > end:
            raise OutOfTimeError
        _say(what)

    with _watchdog(workers, end):
        try:
            workers += [entry.worker(device, (case,)) for entry in entries]
            for entry, worker in zip(entries, workers, strict=True):
                try:
                    worker.ready()
                    alive.append((entry, worker))
                except UserError as error:
                    result["failures"].append(str(error))
                    _say(str(error))
            result["failures"] += run_rounds([w for _, w in alive], [case], repeats, 1, samples, say)
        finally:
            for worker in workers:
                worker.close()
            ids = {i: s[0].tokens for (i, _), s in samples.items() if s}
            first = next((ids[i] for i, (e, _) in enumerate(alive) if e.engine == "ours" and i in ids), None)
            for i, (entry, worker) in enumerate(alive):
                if taken := samples.get((i, case)):
                    result["rows"].append(make_row(entry, worker.facts, case, taken, result["machine"], first))
    if time.monotonic() > end:
        raise OutOfTimeError


@contextmanager
def _watchdog(workers: Sequence[Worker], end: float) -> Iterator[None]:
    """End the children when the time is over: the parent's wait for an answer then ends too."""

    def over() -> None:
        for worker in workers:
            with suppress(OSError):
                os.kill(worker.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.1, end - time.monotonic()), over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def make_row(
    entry: Entry,
    facts: dict[str, Any],
    case: Case,
    samples: Sequence[Sample],
    machine: dict[str, Any] | None,
    ids: tuple[tuple[int, ...], ...] | None,
) -> dict[str, Any]:
    """A row of a result: rates are tokens a second of the whole batch, medians with `_sd`.

    floor_tok_s: what the bytes of a step allow at the copy bandwidth measured on this machine (else at the target's
    peak; `floor_from` says which) · floor_share: of it. same_ids: greedy ids of the first sequence that equal `ids`.
    """
    artifact = open_artifact(entry.path, verify=False, versions=False)
    prefill, decode = rates(case, samples)
    floor, source = floor_tok_s(artifact, case, machine)
    row: dict[str, Any] = {
        "engine": entry.label,
        "artifact": entry.path.name,
        "kind": entry.engine,
        "how": entry.how,
        "model": artifact.manifest["model"],
        "quantization": artifact.manifest["quantization"],
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "generate_tokens": case.generate_tokens,
        "repeats": len(samples),
        "prefill_tok_s": median(prefill),
        "prefill_tok_s_sd": spread(prefill),
        "decode_tok_s": median(decode),
        "decode_tok_s_sd": spread(decode),
        "step_time_us": 1e6 * median(s.decode_s for s in samples) / case.generate_tokens,
        "floor_tok_s": floor,
        "floor_share": median(decode) / floor if floor else None,
        "floor_from": source,
        "same_ids": agreeing(samples[0].tokens[0], ids[0]) if ids is not None else None,
        "date": now(),
    }
    return {**row, **{k: facts.get(k) for k in ("device", "kernels_a_token", "launches_a_token", "rules", "versions")}}


def floor_tok_s(artifact: Artifact, case: Case, machine: dict[str, Any] | None) -> tuple[float | None, str]:
    """Tokens a second of the whole batch if a step did nothing but read its weights and cache once."""
    read_bytes = bounds.decode_step_bytes(
        artifact.config, bounds.artifact_param_bytes(artifact), artifact.manifest["compute_dtype"], case
    )
    if machine is not None:
        return case.batch * machine["copy_gb_s"] * 1e9 / read_bytes, "measured copy"
    peak = (artifact.manifest["target"].get("peak") or {}).get("bandwidth_gb_s")
    return (case.batch * peak * 1e9 / read_bytes, "data sheet") if peak else (None, "")


def ablation(paths: Sequence[Path]) -> list[Entry]:
    """Every artifact of one model launched plainly, and as graphs where it has them."""
    return [Entry(p, "ours", how) for p in paths for how in (("plain", "graph") if has_graphs(p) else ("plain",))]


def beside_torch(path: Path, modes: Sequence[str]) -> list[Entry]:
    """Our engine at its best on one artifact, and torch on the same weights."""
    best = "graph" if has_graphs(path) else "plain"
    return [Entry(path, "ours", best), *(Entry(path, "torch", mode) for mode in modes)]


def read(file: Path) -> dict[str, Any] | None:
    """A result file, or None where there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove it and measure again") from None


def save(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**result, "date": now()}, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("artifact", "kind", "how", "batch", "prompt_tokens", "generate_tokens"))


def _key_of(entry: Entry, case: Case) -> tuple[Any, ...]:
    sizes = (case.batch, case.prompt_tokens, case.generate_tokens)
    return (entry.path.name, entry.engine, entry.how, *sizes)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
