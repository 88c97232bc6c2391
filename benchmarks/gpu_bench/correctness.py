"""Are the numbers right: logits of every artifact beside torch's in float32, and graphs beside plain launches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import open_artifact, read_manifest
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import prompt_of

# Of the largest logit. The reference has the stored weights and computes in float32.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
PROMPT, STEPS, GREEDY = 64, 8, 64


def code_of(path: Path) -> str:
    """What tells an artifact's code from that of another build."""
    library = read_manifest(path)["library"]
    return hashlib.sha256((path / library).read_bytes()).hexdigest()[:16]


def check(path: Path, device: str | None) -> dict[str, Any]:
    """One artifact: prefill and `STEPS` decode steps on torch's tokens, then `GREEDY` tokens with graphs and without.

    Returns `error`, the largest difference of a logit, and `largest`, the largest logit; `share`, one over the other,
    and `allowed`; `same_ids`, whether the graphed ids are the plain ones (None without graphs); `ok`.
    """
    import torch

    from gpt2_tvm.engine import Engine
    from gpu_bench.torch_gpt2 import TorchGPT2

    artifact = open_artifact(path)
    where = "cuda" if artifact.kind == "cuda" else "cpu"
    greedy = min(GREEDY, (artifact.max_seq_len - STEPS) // 2)
    length = min(PROMPT, artifact.max_seq_len - STEPS - greedy)
    ids = prompt_of(artifact, Case(1, length, greedy))
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine(path, device, verify=False)
    error = largest = 0.0
    with torch.inference_mode():
        model = TorchGPT2.load(artifact, 1, length + STEPS, torch.float32, where)
        token, mine = torch.from_numpy(ids).long().to(where), engine.prefill(ids)
        places = torch.arange(length + STEPS, device=where)
        for step in range(STEPS + 1):
            at = places[:length] if step == 0 else places[length + step - 1 : length + step]
            wanted = model(token, at).float()
            error = max(error, float(np.abs(mine - wanted.cpu().numpy()).max()))
            largest = max(largest, float(wanted.abs().max()))
            if step < STEPS:
                token = wanted.argmax(-1, keepdim=True)
                mine = engine.decode(token.cpu().numpy())
    graphs = getattr(engine.runner, "graphs", None)
    seen, refused = [], ""
    for enabled in (False, True) if graphs is not None else ():
        graphs.enabled = enabled
        engine.reset()
        engine.prefill(ids)
        seen.append(engine.decode_greedy(greedy).tolist())
        refused = graphs.refused
    allowed = TOLERANCE[artifact.manifest["compute_dtype"]]
    same = seen[0] == seen[1] if seen else None
    return {
        "artifact": path.name,
        "device": engine.runner.device_name,
        "dtype": artifact.manifest["compute_dtype"],
        "error": error,
        "largest": largest,
        "share": error / largest,
        "allowed": allowed,
        "same_ids": same,
        "refused": refused,
        # not "<": NaN must fail
        "ok": bool(error / largest <= allowed and same is not False and not refused),
    }
