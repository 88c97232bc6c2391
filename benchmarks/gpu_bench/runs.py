"""The timed parts: who takes turns, within how many seconds, and what is written down."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
from gpu_bench.crew import Clock, Crew, OutOfTimeError, alone, say
from gpu_bench.unpacking import SUFFIX, unpacked
from gpu_bench.weights import fill, has_weights

HERE = Path(__file__).resolve().parent
TIMED = ("subjects", "torch_gpt2")  # files that timed rows come from
Row = dict[str, Any]
Key = tuple[Any, ...]


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
    """The artifacts in `kit`/artifacts (or in `kit` itself, or `kit` alone), by name. A packed kit is unpacked beside
    itself first. model: as the manifest has it, or as the kit names its folder ("bundled").

    Raises UserError where there are none of that model and quantization.
    """
    if kit.name.endswith(SUFFIX):
        kit = unpacked(kit)
    folder = kit / "artifacts" if (kit / "artifacts").is_dir() else kit
    found = (
        [folder] if (folder / "manifest.json").is_file() else sorted(p.parent for p in folder.glob("*/manifest.json"))
    )

    def wanted(path: Path) -> bool:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        own = model in (None, manifest["model"]) or path.name.startswith(f"{model}-{manifest['quantization']}-")
        return own and quantization in (None, manifest["quantization"])

    chosen = [path for path in found if wanted(path)]
    if not chosen:
        what = " ".join(filter(None, (model, quantization))) or "artifact"
        raise UserError(f"no {what} in {folder}; make a kit with python benchmarks/gpu.py pack-kit")
    return chosen


def has_graphs(path: Path) -> bool:
    return bool(json.loads((path / "manifest.json").read_text(encoding="utf-8")).get("cuda_graph"))


def run_part(
    part: str,
    groups: Sequence[Sequence[Entry]],
    cases: Sequence[Case],
    repeats: int,
    clock: Clock,
    device: str,
    results: Path,
) -> dict[str, Any]:
    """Let the entries of each group take turns at every case, and write `results`/part.json after each.

    A group's case is done when all of its entries have a row of `repeats` rounds, measured beside each other by this
    code on this machine. An entry that cannot be measured has a typed row among "failures" instead. The same command
    goes on with what was not tried, then tries again, all of its entries taking turns, what failed or was cut off.
    Nothing runs on after the clock's end, and "complete" is false where something is missing.
    """
    file = results / f"{part}.json"
    here = machine_key(device)
    codes = {entry: code_of(entry) for group in groups for entry in group}

    def key(entry: Entry, case: Case) -> Key:
        sizes = (case.batch, case.prompt_tokens, case.generate_tokens)
        return (entry.path.name, entry.engine, entry.how, *sizes, codes[entry], here)

    before = read(file) or {}
    rows = {_key(row): row for row in before.get("rows", ()) if row["repeats"] >= repeats}
    failures = {_key(row): row for row in before.get("failures", ())}
    jobs = [(case, group) for case in cases for group in groups]
    untried = [job for job in jobs if any((k := key(e, job[0])) not in rows and k not in failures for e in job[1])]
    again = [job for job in jobs if job not in untried and any(key(e, job[0]) in failures for e in job[1])]
    names = {entry.path.name for entry in codes}
    for known in (rows, failures):  # of the same artifact in another build, or by another benchmark
        for k in [k for k in known if k[0] in names and (k[-1] != here or k[-2] not in codes.values())]:
            del known[k]
    result: dict[str, Any] = {"part": part, "machine": read(results / "machine.json")}

    def write(complete: bool) -> None:
        result.update(complete=complete, rows=list(rows.values()), failures=list(failures.values()))
        save(file, result)

    left = len(untried) + len(again)
    try:
        for case, group in (*untried, *again):
            clock.begin(f"{case.batch} x {case.prompt_tokens} + {case.generate_tokens}: {len(group)} engines")
            found, failed = one_case(group, case, repeats, clock, device, result["machine"])
            for entry in group:
                k = key(entry, case)
                same: dict[str, Any] = {**_about(entry, case), "code": codes[entry], "machine": here}
                if entry in found:
                    rows[k] = {**found[entry], **same}
                    failures.pop(k, None)
                elif entry in failed:
                    failures[k] = {**same, **failed[entry]}
            left -= 1
            write(False)
    except OutOfTimeError:
        say(f"stopped within {clock.limit_s:.0f} s; the same command goes on from here")
    write(not left and not failures)
    return result


def one_case(
    entries: Sequence[Entry], case: Case, repeats: int, clock: Clock, device: str, machine: dict[str, Any] | None
) -> tuple[dict[Entry, Row], dict[Entry, dict[str, str]]]:
    """Rows of who had all rounds, and why others had not. Rows cut off count for nothing: then none has a row."""
    failed: dict[Entry, dict[str, str]] = {}
    for path in dict.fromkeys(entry.path for entry in entries if not has_weights(entry.path)):
        _, why = alone(f"weights of {path.name}", max(1.0, clock.left - 1), fill, path)
        failed |= {entry: why for entry in entries if entry.path == path and why}
    samples: Samples = {}
    with Crew() as crew:
        turns = _ready([e for e in entries if e not in failed], case, clock, crew, failed, device)

        def next_turn(what: str, taken: int) -> None:
            say(what)
            for turn in turns:
                crew.give(turn.worker, clock.end)
            if turns:  # whoever hangs must not take the others' time
                crew.give(turns[taken % len(turns)].worker, min(clock.end, time.monotonic() + max(5.0, clock.left / 4)))

        run_rounds(turns, [case], repeats, 1, samples, next_turn)
    done = {turn.entry: samples.get((i, case), []) for i, turn in enumerate(turns)}
    short = [turn for turn in turns if len(done[turn.entry]) < repeats]
    failed |= {turn.entry: turn.failed for turn in short}
    if clock.left <= 0 and short:  # the others went on without their peers
        why = {"failure": "timeout", "message": f"the time was over before {repeats} rounds were"}
        return {}, {entry: failed.get(entry, why) for entry in entries}
    good = [turn for turn in turns if turn not in short]
    ids = next((done[t.entry][0].tokens for t in good if t.entry.engine == "ours"), None)
    return {t.entry: make_row(t.entry, t.worker.facts, case, done[t.entry], machine, ids) for t in good}, failed


class Turn:
    """A worker in the rounds (`timing.Timed`), with the reason for which it left them."""

    def __init__(self, entry: Entry, worker: Worker, crew: Crew) -> None:
        self.entry, self.worker, self.crew = entry, worker, crew
        self.label = entry.label
        self.failed: dict[str, str] = {}

    def turn(self, case: Case) -> Sample:
        """The worker's."""
        try:
            return self.worker.turn(case)
        except UserError as error:
            self.failed = self.crew.why(self.worker, error)
            say(self.failed["message"])
            raise


def _ready(
    entries: Sequence[Entry],
    case: Case,
    clock: Clock,
    crew: Crew,
    failed: dict[Entry, dict[str, str]],
    device: str,
) -> list[Turn]:
    """Who is ready within half of the time: ours first, so that the GPU has room for it, then torch's all at once."""
    end = time.monotonic() + clock.left / 2
    turns = []
    for kind in ("ours", "torch"):
        started = [
            Turn(e, crew.add(e.worker(device, (case,)), end), crew)
            for e in entries
            if (e.engine == "ours") == (kind == "ours")
        ]
        for turn in started:
            try:
                turn.worker.ready()
            except UserError as error:
                failed[turn.entry] = crew.why(turn.worker, error)
                say(failed[turn.entry]["message"])
                crew.dismiss(turn.worker)
            else:
                crew.give(turn.worker, clock.end)
                turns.append(turn)
    return turns


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
    peak; `floor_from` says which) · floor_share: of it. same_ids: greedy ids that equal `ids`, of the sequence in which
    they are the fewest.
    """
    artifact = open_artifact(entry.path, verify=False, versions=False)
    prefill, decode = rates(case, samples)
    floor, source = floor_tok_s(artifact, case, machine)
    row: dict[str, Any] = {
        **_about(entry, case),
        "model": artifact.manifest["model"],
        "quantization": artifact.manifest["quantization"],
        "repeats": len(samples),
        "prefill_tok_s": median(prefill),
        "prefill_tok_s_sd": spread(prefill),
        "decode_tok_s": median(decode),
        "decode_tok_s_sd": spread(decode),
        "step_time_us": 1e6 * median(s.decode_s for s in samples) / case.generate_tokens,
        "floor_tok_s": floor,
        "floor_share": median(decode) / floor if floor else None,
        "floor_from": source,
        "same_ids": min(map(agreeing, samples[0].tokens, ids)) if ids is not None else None,
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


def sizes_parts(models: str, quantizations: str, modes: str, then: str) -> list[tuple[str, str, str, list[str]]]:
    """(part, model, precision, torch's modes): every model beside the first modes, then every one beside the others."""
    passes = [("", modes), *([("-then", then)] if then else [])]
    return [
        (f"sizes-{model}-{q}{suffix}", model, q, [mode for mode in chosen.split(",") if mode])
        for suffix, chosen in passes
        for model in models.split(",")
        for q in quantizations.split(",")
    ]


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


@cache
def machine_key(device: str) -> str:
    """Where rows come from: the GPU and its driver, or the processor. Rows of another one are measured again."""
    import subprocess

    from gpt2_tvm.runners.vm import processor_name

    if device != "cuda":
        return f"{device}: {processor_name()}"
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        seen = []
    return seen[0] if seen else device


@cache
def sources(programs: tuple[str, ...]) -> str:
    """A hash of what rows come from: these files of this package, the one that makes weights, and the engine."""
    import gpt2_tvm

    ours = Path(gpt2_tvm.__file__).parent
    here = [HERE / f"{name}.py" for name in (*programs, "weights")]
    files = [*here, ours / "engine.py", *sorted((ours / "runners").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@cache
def code_of(entry: Entry, programs: tuple[str, ...] = TIMED) -> str:
    """What tells an entry's code from that of another build: of ours its library, of torch its version; and `sources`
    of what runs it."""
    from importlib.metadata import PackageNotFoundError, version

    manifest = json.loads((entry.path / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(sources(programs).encode())
    if entry.engine == "ours":
        digest.update((entry.path / manifest["library"]).read_bytes())
    else:
        try:
            digest.update(version("torch").encode())
        except PackageNotFoundError:
            digest.update(b"torch")
    return digest.hexdigest()[:16]


def _about(entry: Entry, case: Case) -> Row:
    return {
        "engine": entry.label,
        "artifact": entry.path.name,
        "kind": entry.engine,
        "how": entry.how,
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "generate_tokens": case.generate_tokens,
    }


def _key(row: Row) -> Key:
    """See `run_part`; rows of before these were written have no code and no machine, and are measured again."""
    names = ("artifact", "kind", "how", "batch", "prompt_tokens", "generate_tokens")
    return (*(row[name] for name in names), row.get("code"), row.get("machine"))
