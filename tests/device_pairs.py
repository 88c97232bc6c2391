"""A model and its draft, compiled so that a round of speculation stays on the device, and what tests of it count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import checkpoint
from tvm import relax

from gpt2_tvm import Engine, attention, compile_model
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.decoding.device_speculative import DeviceSpeculative
from gpt2_tvm.decoding.early import truncate
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.kernels.spec import GpuLimits

CONFIG = GPT2Config(vocab_size=11, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)
SPREAD = 6.0  # of the weights: text that varies, and drafts that agree now and then
WEBGPU = GpuLimits("webgpu", threads_per_block=256, shared_memory_bytes=32768, warp_size=1)


def make_models(folder: Path) -> tuple[Path, Path]:
    """A checkpoint, and its first two layers."""
    model = checkpoint(folder / "model", CONFIG, spread=SPREAD)
    return model, truncate(ModelSource("model", CONFIG, folder=model), 2, folder / "first")


def pair(
    models: tuple[Path, Path], folder: Path, target: str = "cpu", widths: tuple[int, ...] = (4, 8), **options: Any
) -> tuple[Path, Path]:
    """The artifacts of a target and its draft."""
    options = {"rules": "baseline", "batch_sizes": (1, 4), **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.CpuKernels, "speculates", True)
        first, second = (
            compile_model(str(m), target, output=folder / m.name, verify_widths=w, **options)
            for m, w in zip(models, (widths, (2,) if target == "cpu" else ()), strict=True)
        )
    return first, second


def opened(paths: tuple[Path, Path]) -> tuple[Engine, Engine]:
    return Engine(paths[0]), Engine(paths[1])


def prompts(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, longest))).tolist() for _ in range(count)]


def decoding(engines: tuple[Engine, Engine], given: list[list[int]], n: int, m: object, eos: int | None = None) -> Any:
    strategy = make_strategy("speculative", engines[0], draft=engines[1], length=str(m))
    assert isinstance(strategy, DeviceSpeculative)
    return Decoding(strategy, given, n, eos)


def greedy(engines: tuple[Engine, Engine], given: list[list[int]], n: int, eos: int | None = None) -> list[list[int]]:
    return Decoding(make_strategy("greedy", engines[0]), given, n, eos).run()


def counting(original: Callable[..., Any], name: str, counted: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        counted[name] += 1
        return original(*arguments)

    return call


def read_backs(engines: tuple[Engine, Engine]) -> tuple[pytest.MonkeyPatch, Counter[str]]:
    patch, counted = pytest.MonkeyPatch(), Counter[str]()
    for name, engine in zip(("target", "draft"), engines, strict=True):
        patch.setattr(engine.runner, "download", counting(engine.runner.download, name, counted))
    return patch, counted


def externs(mod: Any, name: str) -> set[str]:
    """Names of the runtime's functions that a function calls, itself or in its graph."""
    found: set[str] = set()
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function) and (var.name_hint == name):

            def visit(node: Any) -> None:
                if isinstance(node, relax.ExternFunc):
                    found.add(str(node.global_symbol))

            relax.analysis.post_order_visit(func, visit)
    return found
