"""mlc_llm as one more row of an ablation (--peer mlc_llm): its own pipeline, the same weights, checks and turns."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.errors import UserError
from gpt2_tvm.files import replacing_folder
from gpt2_tvm.mlc import peer
from gpt2_tvm.mlc.chat_config import CHAT_CONFIG
from targets import DeviceTarget
from tuning import ablation_cache, ablation_reference
from tuning.ablation_work import Job, Subject
from tuning.children import Announce
from tuning.variants import Variant

PEER = "mlc_llm"
VARIANT = Variant(PEER, (PEER,))  # its rules are its own: there is no list of them to name
LIBRARY = "model.so"


def require(name: str, job: Job, source: ModelSource, target: DeviceTarget) -> None:
    """UserError for a peer that is none, is not installed, or cannot run what the other sets are."""
    if name != PEER:
        raise UserError(f"unknown --peer {name!r}; there is {PEER}")
    peer.require_runnable(f"--peer {name}", source.config, target.kind, source.name)
    if job.quantization not in peer.SCHEMES:
        raise UserError(f"--peer {name}: it has no {job.quantization}; compare one of {', '.join(peer.SCHEMES)}")
    if job.remote:
        raise UserError(f"--peer {name}: what it compiles runs on this machine alone; leave out --tracker")


def build(announce: Announce, job: Job) -> dict[str, Any]:
    """Convert and compile with mlc_llm into the cache, unless this version of it did -> what `ablation_work.build` and
    its notes say of a set, as far as it is known of somebody else's code."""
    from gpt2_tvm.build import versions
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.weights import iter_weights, write_hf_checkpoint
    from targets import load_target, specialise

    source, target = resolve_model(job.model, seed=job.seed), specialise(load_target(job.target))
    weights = ablation_cache.weights_identity(source)
    made_of = [PEER, peer.mlc_llm_version(), versions(), source.name, source.config.to_json(), weights]
    code = ablation_cache.digest([*made_of, job.quantization, target.to_json()])
    folder = Path(job.cache) / f"{PEER}-{code}"
    start = time.perf_counter()
    if fresh := not (folder / LIBRARY).is_file():
        announce("build: mlc_llm converts and compiles")
        with TemporaryDirectory(prefix="gpt2-tvm-peer-") as scratch, replacing_folder(folder, CHAT_CONFIG) as work:
            random = Path(scratch) / "checkpoint"
            checkpoint = source.folder or write_hf_checkpoint(random, source.config, iter_weights(source))
            peer.build(checkpoint, work, LIBRARY, job.quantization, target.kind)
    return {
        "code": code,
        "functions": [],
        **dict.fromkeys(("launches_prefill", "launches_token", "bytes_token")),
        "artifact": folder.name,
        "compile_s": round(time.perf_counter() - start, 2) if fresh else None,
    }


class PeerSubject(Subject):
    """What mlc_llm compiled, driven through MLC's interface as its engine would."""

    def __init__(self, announce: Announce, job: Job, folder: str) -> None:
        announce("load")
        from gpt2_tvm.checkpoint import resolve_model
        from gpt2_tvm.mlc.library import open_library
        from gpt2_tvm.mlc.lockstep import Lockstep
        from targets import load_target

        self._announce, self._job = announce, job
        library = open_library(folder, load_target(job.target).kind, job.device)
        tokens = ablation_reference.tokens_needed(job.prompt_tokens, job.generate_tokens)
        self._engine: Any = Lockstep(library.engine(1, tokens))
        source = resolve_model(job.model, seed=job.seed)
        self._prompt = ablation_reference.prompt_of(source, job.prompt_tokens)[None]
        self.facts = {"device": library.device_name}

    def _cycle(self, generate: int, parts: int = 1, prompt_tokens: int | None = None) -> tuple[float, float]:
        engine = self._engine
        engine.reset()
        start = time.perf_counter()
        engine.prefill(self._prompt[:, :prompt_tokens])
        middle = time.perf_counter()
        engine.decode_greedy(generate)
        return middle - start, time.perf_counter() - middle

    def _parts(self) -> int:
        return 1
