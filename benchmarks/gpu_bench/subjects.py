"""What is timed, each in a process of its own (`gpt2_tvm.measure.workers.Worker`): our engine, and torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.subjects import prompt_of


def versions(*packages: str) -> dict[str, str]:
    """Versions of what is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def kernels_a_token(manifest: dict[str, Any], batch: int) -> int:
    """Kernels of one greedy step of `batch` sequences: of the smallest compiled size that holds them."""
    slots = min((size for size in manifest["batch_sizes"] if size >= batch), default=max(manifest["batch_sizes"]))
    return int(manifest["launches"][f"greedy_b{slots}"])


class Ours:
    """An artifact in our engine (`measure.subjects.Subject`). graphs: None leaves the artifact's default, False runs
    every kernel from the host."""

    def __init__(self, path: str, device: str | None, graphs: bool | None, cases: Sequence[Case]) -> None:
        from gpt2_tvm.engine import Engine

        self.engine = Engine(path, device, verify=False)  # gigabytes made here a minute ago
        self.graphs = getattr(self.engine.runner, "graphs", None)
        if graphs is not None and self.graphs is not None:
            self.graphs.enabled = graphs
        if graphs and self.graphs is None:
            raise UserError(f"{path} has no CUDA graphs; compile it for CUDA, with --cuda-graph")
        self._prompts: dict[Case, np.ndarray] = {}
        manifest = self.engine.artifact.manifest
        kernels = kernels_a_token(manifest, cases[0].batch)
        self.facts: dict[str, Any] = {
            "device": self.engine.runner.device_name,
            "kernels_a_token": kernels,
            "launches_a_token": 1 if self.graphs is not None and self.graphs.enabled else kernels,
            "rules": manifest["rules"],
            "versions": versions("gpt2-tvm", "apache-tvm", "apache-tvm-ffi"),
        }
        for case in cases:  # caches and graphs take their memory here, before others look for theirs
            self._warm(case)

    def turn(self, case: Case) -> Sample:
        """From an empty cache: the prompt, then so many of the most likely tokens. RuntimeError where CUDA refused to
        capture: the figure would be another engine's."""
        engine, ids = self.engine, self._warm(case)
        engine.runner.sync()
        start = time.perf_counter()
        engine.prefill(ids)
        middle = time.perf_counter()
        tokens = engine.decode_greedy(case.generate_tokens)
        end = time.perf_counter()
        if self.graphs is not None and self.graphs.enabled and self.graphs.refused:
            raise RuntimeError(f"no CUDA graph: {self.graphs.refused}")
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in tokens.tolist()))

    def _warm(self, case: Case) -> np.ndarray:
        """The prompt, once through the engine as torch's is, and two tokens; the cache is empty then."""
        engine = self.engine
        if case not in self._prompts:
            self._prompts[case] = prompt_of(engine.artifact, case)
        engine.reset()
        engine.prefill(self._prompts[case])
        engine.decode_greedy(min(2, case.generate_tokens))  # the first of a batch size is captured
        engine.reset()
        return self._prompts[case]


class Torch:
    """An artifact's weights in `torch_gpt2`, in one of its modes. The compiled ones compile here, before the rounds."""

    def __init__(self, path: str, device: str, mode: str, cases: Sequence[Case]) -> None:
        import torch

        self._torch, self._mode, self._device = torch, mode, device
        self._artifact: Artifact = open_artifact(path, verify=False)
        self._dtype = torch.float16 if self._artifact.manifest["compute_dtype"] == "float16" else torch.float32
        self._made: tuple[tuple[int, int], Any] | None = None
        self._prompts: dict[Case, Any] = {}
        self.facts: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "launches_a_token": 1 if mode == "cuda-graph" else None,
            "versions": versions("torch", "triton"),
        }
        with torch.inference_mode():
            for case in cases:
                self._run(case, min(4, case.generate_tokens))
        if device == "cuda" and mode == "eager":
            self.facts["kernels_a_token"] = self.facts["launches_a_token"] = self._kernels(cases[0])

    def turn(self, case: Case) -> Sample:
        """See `Ours.turn`."""
        with self._torch.inference_mode():
            return self._run(case, case.generate_tokens)

    def _decoder(self, case: Case) -> Any:
        from gpu_bench.torch_gpt2 import Decoder, TorchGPT2

        capacity = case.prompt_tokens + case.generate_tokens
        key = (case.batch, capacity)
        if self._made is None or self._made[0] != key:  # one at a time: a batch of 64 has a cache to match
            self._made = None
            model = TorchGPT2.load(self._artifact, case.batch, capacity, self._dtype, self._device)
            self._made = key, Decoder(model, self._mode, case.batch, capacity)
        return self._made[1]

    def _run(self, case: Case, generate: int) -> Sample:
        decoder = self._decoder(case)
        if case not in self._prompts:
            ids = self._torch.from_numpy(prompt_of(self._artifact, case)).long()
            self._prompts[case] = ids.to(self._device)
        ids = self._prompts[case]
        decoder.decode(decoder.prefill(ids), case.prompt_tokens, min(2, generate))
        self._sync()
        start = time.perf_counter()
        token = decoder.prefill(ids)
        middle = time.perf_counter()
        appended = self._torch.cat(decoder.decode(token, case.prompt_tokens, generate), 1).cpu()  # as ours: read back
        end = time.perf_counter()
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in appended.tolist()))

    def _sync(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def _kernels(self, case: Case) -> int | None:
        """Kernels of one eager step, as torch's profiler counts them."""
        from torch.profiler import ProfilerActivity, profile

        decoder = self._decoder(case)
        with self._torch.inference_mode():
            token = decoder.prefill(self._prompts[case])
            try:
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    decoder.decode(token, case.prompt_tokens, 1)
                    self._sync()
            except RuntimeError:  # a machine may keep its counters to itself
                return None
        return count_kernels(seen.events()) or None


def count_kernels(events: Iterable[Any]) -> int:
    """Kernels among a profile's events: what ran on the GPU, less copies and fills. The host's calls (cudaLaunchKernel,
    cuLaunchKernel) are events too, of the CPU."""
    return sum(
        event.device_type.name == "CUDA" and not event.name.lower().startswith(("memcpy", "memset")) for event in events
    )
