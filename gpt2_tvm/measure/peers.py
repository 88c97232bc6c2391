"""Other programs with the same weights, timed in the same run: transformers in PyTorch's eager mode, and mlc_llm.

The weights are taken out of the artifact itself, so they are the same by construction, whatever the artifact
was made from; float16 ones are widened to float32. transformers runs as its users run it: its default
attention (scaled_dot_product_attention), its own KV cache, logits for the last position alone. mlc_llm converts and
compiles them with its own commands (`mlc.peer`); what it makes is driven as its engine would, the host choosing.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.subjects import prompt_of

if TYPE_CHECKING:
    from gpt2_tvm.mlc.lockstep import Lockstep

PEERS = ("transformers", "mlc_llm")
# What an artifact's kind is called in torch; a peer on another device would be no comparison.
_TORCH_DEVICES = {"cpu": "cpu", "cuda": "cuda", "rocm": "cuda", "metal": "mps"}
_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def check_peer(name: str, artifact: Artifact) -> None:
    """Refuse, in one line, a peer that is unknown, not installed, or cannot run what the artifact holds."""
    if name not in PEERS:
        raise UserError(f"unknown --peer {name!r}; there is {', '.join(PEERS)}")
    if name == "mlc_llm":
        from gpt2_tvm.mlc.peer import require_runnable

        require_runnable(f"--peer {name}", artifact.config, artifact.kind, artifact.path)
    else:
        _check_transformers(name, artifact)
    expected = _expected(artifact.config)
    foreign = [r["name"] for _, r in stored_records(artifact) if r["dtype"] not in _FLOATS or r["name"] not in expected]
    if foreign:
        raise UserError(
            f"--peer {name}: {artifact.path} stores quantised weights ({foreign[0]}), which have no float32 "
            "original to compare with; compare an artifact of --quantization q0f32 or q0f16"
        )


def _check_transformers(name: str, artifact: Artifact) -> None:
    missing = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"--peer {name} needs {' and '.join(missing)}: pip install 'gpt2-tvm[reference]'")
    if artifact.kind not in _TORCH_DEVICES:
        raise UserError(f"--peer {name}: torch has no {artifact.kind} device to compare {artifact.path} on")
    if artifact.config.pruned:
        raise UserError(f"--peer {name}: {artifact.path} is pruned, and {name} has no such model; compare a whole one")


def stored_records(artifact: Artifact) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(shard, record) of every parameter, in the order stored; a record has name, shape, dtype, nbytes, byteOffset."""
    index = json.loads((artifact.params / "tensor-cache.json").read_text(encoding="utf-8"))
    for shard in index["records"]:
        for record in shard["records"]:
            yield artifact.params / shard["dataPath"], record


def unpack(stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A weight as stored -> [N, K], the inverse of `kernels.packed_linear.pack`.

    stored: [P, K, R], where row n of the weight is [n // R, :, n % R] and rows past N are padding; or
    anything that has `shape` already. Raises ValueError for a shape that is neither.
    """
    if stored.shape == shape:
        return stored
    if stored.ndim == 3 and len(shape) == 2:
        panels, k, rows = stored.shape
        if k == shape[1] and panels == -(-shape[0] // rows):
            return stored.transpose(0, 2, 1).reshape(panels * rows, k)[: shape[0]]
    raise ValueError(f"a stored weight of shape {list(stored.shape)} is no layout of {list(shape)}")


def artifact_weights(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of an artifact with float weights: (name, array) in the plain layout of
    `weights.expected_tensors`, one at a time, in the stored dtype."""
    expected = _expected(artifact.config)
    for path, record in stored_records(artifact):
        mapped = np.memmap(path, np.uint8, "r")[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
        yield (
            record["name"],
            unpack(mapped.view(_FLOATS[record["dtype"]]).reshape(record["shape"]), expected[record["name"]]),
        )


def _expected(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    from gpt2_tvm.weights import expected_tensors

    return expected_tensors(config)


class TransformersSubject:
    """An artifact's weights in transformers, float32 (`measure.subjects.Subject`).

    Args:
        path: the artifact's folder.
        scratch: an empty folder; the weights go through it as a Hugging Face checkpoint. The caller removes it.
        threads: of the CPU; default what our engine takes.
    """

    def __init__(self, path: str, scratch: str, threads: int | None = None) -> None:
        import torch
        import transformers

        from gpt2_tvm.runners.threads import check_threads
        from gpt2_tvm.runners.vm import processor_name
        from gpt2_tvm.weights import write_hf_checkpoint

        self._artifact = open_artifact(path)
        self._torch = torch
        device = _TORCH_DEVICES[self._artifact.kind]
        present = {
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        if not present[device]:
            raise UserError(f"--peer transformers: this torch ({torch.__version__}) has no {device} device")
        torch.set_num_threads(check_threads(threads))
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        write_hf_checkpoint(scratch, self._artifact.config, artifact_weights(self._artifact))
        model = transformers.GPT2LMHeadModel.from_pretrained(scratch)
        self._model = model.float().to(device).eval()
        self._prompts: dict[Case, Any] = {}
        name = processor_name() if device == "cpu" else torch.cuda.get_device_name() if device == "cuda" else device
        self.facts = {
            "device": name,
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "attention": str(getattr(model.config, "_attn_implementation", "default")),
            "versions": {p: version(p) for p in ("torch", "transformers")},
        }

    def turn(self, case: Case) -> Sample:
        torch, model = self._torch, self._model
        if case not in self._prompts:
            ids = torch.from_numpy(prompt_of(self._artifact, case).astype(np.int64))
            self._prompts[case] = ids.to(model.device)
        ids = self._prompts[case]
        steps = []
        with torch.inference_mode():
            model(ids[:, :1], logits_to_keep=1)[0].tolist()  # untimed, as in EngineSubject
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()  # waits for the device
            middle = time.perf_counter()
            for _ in range(case.generate_tokens):
                steps.append(token)
                out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
            end = time.perf_counter()
        tokens = torch.cat(steps, dim=1).tolist()
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in tokens))


class MlcLlmSubject:
    """An artifact's weights as mlc_llm compiles them (`measure.subjects.Subject`); arguments as of
    `TransformersSubject`. float16 weights stay float16, others become float32."""

    def __init__(self, path: str, scratch: str, threads: int | None = None) -> None:
        from gpt2_tvm.mlc import peer
        from gpt2_tvm.mlc.library import open_library
        from gpt2_tvm.mlc.lockstep import Lockstep
        from gpt2_tvm.weights import write_hf_checkpoint

        self._artifact = artifact = open_artifact(path)
        checkpoint, folder = Path(scratch) / "checkpoint", Path(scratch) / "mlc"
        scheme = peer.scheme_for(artifact.manifest["quantization"])
        write_hf_checkpoint(checkpoint, artifact.config, artifact_weights(artifact))
        if artifact.tokenizer is not None:
            shutil.copytree(artifact.tokenizer, checkpoint, dirs_exist_ok=True)
        folder.mkdir()
        peer.build(checkpoint, folder, "model.so", scheme, artifact.kind)
        self._library, self._wrap = open_library(folder, artifact.kind, threads=threads), Lockstep
        self._engine: Lockstep | None = None
        self._case: Case | None = None
        self.facts = {
            "device": self._library.device_name,
            "threads": self._library.threads,
            "attention": "paged",
            "quantization": scheme,
            "versions": {"mlc_llm": peer.mlc_llm_version()},
        }

    def turn(self, case: Case) -> Sample:
        ids = prompt_of(self._artifact, case)
        if self._engine is None or case != self._case:
            paged = self._library.engine(case.batch, case.prompt_tokens + case.generate_tokens)
            self._engine, self._case = self._wrap(paged), case
        engine = self._engine
        engine.reset()
        engine.prefill(ids[:, :1])  # untimed, as in EngineSubject
        engine.reset()
        start = time.perf_counter()
        engine.prefill(ids)
        middle = time.perf_counter()
        tokens = engine.decode_greedy(case.generate_tokens)
        end = time.perf_counter()
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in tokens.tolist()))


SUBJECTS = {"transformers": TransformersSubject, "mlc_llm": MlcLlmSubject}
