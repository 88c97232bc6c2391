"""The engines by name. Another one is another line here, and a file with its subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.subjects import Subject

from . import ct2, llama, ours, torch_models
from .setup import Setup

PRECISIONS = ("float32", "float16", "int8")  # of stored weights: an engine is compared with those of its own


@dataclass(frozen=True)
class Engine:
    """One line of the table.

    Attributes:
        name: what --engines calls it.
        precision: one of `PRECISIONS`, or another of ours without a peer.
        subject: makes it, from a setup and what `prepare` gave; called in the process that runs it.
        prepare: makes its files in a folder and returns a path; None: it reads the checkpoint.
        packages: modules that it needs.
        weight_bits: of a stored weight, scales included; None: the artifact says.
        cache: dtype of its KV cache.
        scheme: of ours, None for a peer.
        exact: whether its greedy ids must be ours.
    """

    name: str
    precision: str
    subject: Callable[[Setup, str], Subject]
    prepare: Callable[[Setup, Path], str] | None = None
    packages: tuple[str, ...] = ()
    weight_bits: float | None = None
    cache: str = "float32"
    scheme: str | None = None
    exact: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, in one line; None if it can."""
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"no {' and no '.join(absent)} here: pip install 'gpt2-tvm[peers]'" if absent else None

    def with_cache(self, cache: str) -> Engine:
        """The same, its cache's dtype known now that its artifact is there."""
        return replace(self, cache=cache)


_TORCH = ("torch", "transformers")
_LLAMA = ("llama_cpp", "gguf")
_CT2 = ("ctranslate2", *_TORCH)


def _llama(name: str, kind: str, precision: str, bits: float, cache: str) -> Engine:
    make, load = partial(_call, llama.write_model, kind), partial(_call, llama.LlamaSubject, cache)
    return Engine(name, precision, load, make, _LLAMA, bits, cache, exact=precision == "float32")


def _ct2(name: str, compute: str, bits: float) -> Engine:
    make, load = partial(_call, ct2.convert, compute), partial(_call, ct2.Ct2Subject, compute)
    return Engine(name, compute, load, make, _CT2, bits, exact=compute == "float32")


def _call(function: Callable[..., Any], last: str, setup: Setup, path: Any) -> Any:
    """partial() binds from the left; the option of these comes last."""
    return function(setup, path, last)


PEERS: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("transformers", "float32", torch_models.EagerSubject, packages=_TORCH, weight_bits=32, exact=True),
        Engine("torch-compile", "float32", torch_models.CompiledSubject, packages=_TORCH, weight_bits=32, exact=True),
        # llama.cpp's default cache is float16; beside float32 engines it gets theirs. The default is a line further on.
        _llama("llama-f32", "f32", "float32", 32, "float32"),
        _llama("llama-f32-kv16", "f32", "float32", 32, "float16"),
        _llama("llama-f16", "f16", "float16", 16, "float16"),
        _llama("llama-q8_0", "q8_0", "int8", 8 + 16 / 32, "float16"),  # a float16 scale for 32 weights
        _ct2("ct2-float32", "float32", 32),
        _ct2("ct2-int8", "int8", 8),
    )
}
DEFAULT = ("ours", *(name for name in PEERS if name != "llama-f32-kv16"))


def ours_of(scheme: str) -> Engine:
    """Our engine with weights of that scheme."""
    weights = scheme.partition("f")[0]
    precision = {"q0f32": "float32", "q0f16": "float16", "q16f32": "float16"}.get(scheme)
    precision = precision or ("int8" if weights == "q8" else scheme)
    make = partial(_call, ours.compile_artifact, scheme)
    exact = precision == "float32"
    return Engine(f"ours {scheme}", precision, ours.OursSubject, make, scheme=scheme, exact=exact)


def choose(names: Sequence[str], schemes: Sequence[str]) -> list[Engine]:
    """The engines of --engines and --schemes, in the order of the table: by precision, ours first in each.

    Raises UserError for a name that there is not, and where nothing is chosen.
    """
    unknown = [name for name in names if name != "ours" and name not in PEERS]
    if unknown:
        raise UserError(f"--engines: there is no {unknown[0]!r}; choose of ours, {', '.join(PEERS)}")
    chosen = [ours_of(scheme) for scheme in dict.fromkeys(schemes)] if "ours" in names else []
    chosen += [PEERS[name] for name in dict.fromkeys(names) if name != "ours"]
    if not chosen:
        raise UserError("--engines and --schemes leave nothing to measure; name at least one")
    rank = {precision: i for i, precision in enumerate(PRECISIONS)}
    return sorted(chosen, key=lambda e: (rank.get(e.precision, len(rank)), e.scheme is None))


def stored_bytes(config: GPT2Config, bits: float) -> dict[str, float]:
    """Bytes of each parameter where a weight of a matrix takes `bits`, and all else is float32."""
    from gpt2_tvm.weights import expected_tensors

    sizes = expected_tensors(config).items()
    return {name: prod(shape) * (bits / 8 if len(shape) == 2 else 4) for name, shape in sizes}
