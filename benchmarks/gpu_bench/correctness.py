"""Are the numbers right: logits of every artifact beside torch's in float32, and graphs beside plain launches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import prompt_of
from gpu_bench.crew import Clock
from gpu_bench.pieces import Piece, complaints, in_its_process, origin, work_through
from gpu_bench.runs import Row, find_artifacts

# Of a logit, in float32 and float16; see `within`.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
PROMPTS, STEPS, GREEDY = (64, 322), 8, 64


def within(error: float, largest: float, allowed: float) -> bool:
    """Whether logits that are `error` off, of which the largest is `largest`, are right.

    The bound is absolute, 2e-2 in float16 and 1e-3 in float32, as long as logits are of the size of 1. Trained GPT-2s
    have logits of -30 to -130, and there one last place of a float16 alone is 0.03 to 0.06: the bound then grows with
    the largest logit. Both the error and its share of the largest logit are in the row. What is not a number fails.
    """
    return bool(np.isfinite(error) and np.isfinite(largest) and error <= allowed * max(1.0, largest))


def check_all(kit: Path, results: Path, model: str | None, clock: Clock, each_s: float) -> list[str]:
    """Check every artifact of the kit, each in a process of its own and within `each_s` -> what failed, a line each;
    correctness.json has the rows (`work_through`)."""

    def checked(path: Path, left_s: float) -> Row:
        row = in_its_process(path, left_s, check, None, each_s=each_s)
        return failure_row() | row if row.get("failure") else row

    programs = ("correctness", "torch_gpt2")
    pieces = [Piece(origin(path, "cuda", programs), partial(checked, path)) for path in find_artifacts(kit, model)]
    return complaints(work_through(results / "correctness.json", pieces, clock), pieces)


def failure_row() -> dict[str, Any]:
    """What a row has where there are no numbers."""
    numbers = dict.fromkeys(("error", "largest", "share", "allowed"))
    return {**numbers, "same_ids": None, "refused": "", "sizes": [], "ok": False}


def check(path: Path, device: str | None) -> dict[str, Any]:
    """One artifact: for every batch it was compiled for, and prompts of 64 and 322 tokens (or what the context holds),
    prefill and `STEPS` decode steps on torch's tokens; each sequence has a prompt of its own. Then `GREEDY` tokens with
    graphs and without.

    Returns `error`, the largest difference of a logit, and `largest`, the largest logit; `share`, one over the other,
    and `allowed`; `sizes`, these for each size; `same_ids`, whether the graphed ids are the plain ones (None without
    graphs); `ok`.
    """
    import torch

    from gpt2_tvm.engine import Engine

    artifact = open_artifact(path)
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine(path, device, verify=False)
    allowed = TOLERANCE[artifact.manifest["compute_dtype"]]
    sizes = []
    for case in cases_of(artifact):
        error, largest = compare(engine, artifact, case)
        sizes.append({"batch": case.batch, "prompt_tokens": case.prompt_tokens, "error": error, "largest": largest})
    worst = max(sizes, key=lambda s: s["error"] / s["largest"] if np.isfinite(s["error"]) else np.inf)
    same, refused = same_ids(engine, artifact)
    finite = np.isfinite(worst["error"])
    return {
        "device": engine.runner.device_name,
        "dtype": artifact.manifest["compute_dtype"],
        # JSON has no NaN
        "error": max(s["error"] for s in sizes) if finite else None,
        "largest": worst["largest"],
        "share": worst["error"] / worst["largest"] if finite else None,
        "allowed": allowed,
        "sizes": [{**s, "error": s["error"] if np.isfinite(s["error"]) else None} for s in sizes],
        "same_ids": same,
        "refused": refused,
        "failure": "",
        "message": "" if finite else "logits that are not numbers",
        "ok": all(within(s["error"], s["largest"], allowed) for s in sizes) and same is not False and not refused,
    }


def cases_of(artifact: Artifact) -> Iterator[Case]:
    """The sizes to check: the least work first, so that a fault shows early."""
    most = artifact.max_seq_len - STEPS
    for batch in sorted(artifact.batch_sizes):
        for length in dict.fromkeys(min(n, most) for n in PROMPTS):
            yield Case(batch, length, STEPS)


def prompts_of(artifact: Artifact, case: Case) -> np.ndarray:
    """The benchmark's prompt, begun elsewhere in each sequence: what mixes sequences up shows."""
    ids = prompt_of(artifact, case)
    return np.stack([np.roll(row, -7 * b) for b, row in enumerate(ids)])


def compare(engine: Any, artifact: Artifact, case: Case) -> tuple[float, float]:
    """(largest difference of a logit, largest logit); not a number where one of ours is none."""
    import torch

    from gpu_bench.torch_gpt2 import TorchGPT2

    where = "cuda" if artifact.kind == "cuda" else "cpu"
    ids = prompts_of(artifact, case)
    error = largest = 0.0
    engine.reset()
    with torch.inference_mode():
        model = TorchGPT2.load(artifact, case.batch, case.prompt_tokens + STEPS, torch.float32, where)
        places = torch.arange(case.prompt_tokens + STEPS, device=where)
        mine = engine.prefill(ids)
        wanted = model.prefill(torch.from_numpy(ids).long().to(where), places[: case.prompt_tokens]).float()
        for step in range(STEPS + 1):
            if not (np.isfinite(mine).all() and bool(wanted.isfinite().all())):  # max(0, nan) is 0
                return float("nan"), max(largest, 1.0)
            error = max(error, float(np.abs(mine - wanted.cpu().numpy()).max()))
            largest = max(largest, float(wanted.abs().max()))
            if step < STEPS:
                token = wanted.argmax(-1, keepdim=True)
                mine = engine.decode(token.cpu().numpy())
                at = case.prompt_tokens + step
                wanted = model(token, places[at : at + 1]).float()
    return error, largest


def same_ids(engine: Any, artifact: Artifact) -> tuple[bool | None, str]:
    """(whether graphs give the ids of plain launches at every batch, None without graphs; why CUDA refused)."""
    graphs = getattr(engine.runner, "graphs", None)
    if graphs is None:
        return None, ""
    same = True
    for batch in sorted(artifact.batch_sizes):
        greedy = min(GREEDY, artifact.max_seq_len // 2)
        ids = prompts_of(artifact, Case(batch, min(PROMPTS[0], artifact.max_seq_len - greedy), greedy))
        seen = []
        for enabled in (False, True):
            graphs.enabled = enabled
            engine.reset()
            engine.prefill(ids)
            seen.append(engine.decode_greedy(greedy).tolist())
        same = same and seen[0] == seen[1]
    return same, str(graphs.refused)
