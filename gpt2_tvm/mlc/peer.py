"""The same checkpoint through mlc_llm's own pipeline, where that package is installed: a peer to compare with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.chat_config import CHAT_CONFIG

if TYPE_CHECKING:
    from gpt2_tvm.config import GPT2Config

HOW_TO_GET_IT = "it is on no package index that pip asks by itself: see https://llm.mlc.ai/docs/install/mlc_llm.html"

SUFFIX = {"webgpu": ".wasm"}  # of the library; else .so
SCHEMES = ("q0f32", "q0f16", "q4f16_1", "q4f32_1")  # that both projects have, under the same names


def require_mlc_llm(option: str = "--pipeline mlc_llm") -> None:
    """UserError, with where to get it, if mlc_llm is not installed. option: what asked for it."""
    if importlib.util.find_spec("mlc_llm") is None:
        raise UserError(f"{option}: mlc_llm is not installed; {HOW_TO_GET_IT}")


def require_runnable(option: str, config: GPT2Config, kind: str, what: object) -> None:
    """UserError where a model of mlc_llm's cannot run beside ours: it is not installed, its GPT-2 computes something
    else, or nobody here can run its library. what: the model, for the message."""
    require_mlc_llm(option)
    if kind == "webgpu":
        raise UserError(f"{option}: its libraries for webgpu run in web-llm alone; compare on another target")
    plain = config.scale_attn_weights and config.activation_function == "gelu_new" and not config.pruned
    if not plain:
        raise UserError(f"{option}: mlc_llm's GPT-2 is not what {what} is (gelu_new, scaled attention, all heads)")


def scheme_for(quantization: str) -> str:
    """mlc_llm's scheme of the same numbers as one of ours; float numbers that it has no scheme for become float32."""
    return quantization if quantization in SCHEMES else "q0f32"


def mlc_llm_version() -> str:
    """Of the package that brings mlc_llm, under whatever name it was installed."""
    names = importlib.metadata.packages_distributions().get("mlc_llm", [])
    return importlib.metadata.version(names[0]) if names else "unknown"


def compile_with_mlc_llm(
    model: str, target: str, quantization: str, output: str | Path | None, max_seq_len: int | None
) -> str:
    """Convert, configure and compile with `python -m mlc_llm` -> a line on what was made.

    The folder is as `export_mlc` writes one: configuration, tensor cache, tokenizer and library. Raises UserError where
    mlc_llm is missing or fails, and for a scheme, a target or weights that it cannot take.
    """
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.files import replacing_folder
    from targets import load_target

    require_mlc_llm()
    device = load_target(target)
    if quantization not in SCHEMES:
        raise UserError(f"--quantization {quantization} is not mlc_llm's; choose one of {', '.join(SCHEMES)}")
    source = resolve_model(model)
    if source.folder is None:
        raise UserError(f"--pipeline mlc_llm converts a checkpoint, and {model} has random weights here; give a folder")
    final = Path(output) if output else Path("artifacts") / f"{source.name}-{quantization}-{device.name}-mlc_llm"
    name = f"{source.name}-{quantization}-{device.kind}{SUFFIX.get(device.kind, '.so')}"
    with replacing_folder(final, CHAT_CONFIG) as folder:
        build(source.folder, folder, name, quantization, device.kind, max_seq_len)
    return f"{final}: {source.name}, {quantization}, for {device.name}, by mlc_llm: {name}"


def build(
    checkpoint: Path, folder: Path, library: str, quantization: str, kind: str, max_seq_len: int | None = None
) -> None:
    """Convert, configure and compile a checkpoint into `folder`, which exists. kind: the device, as TVM calls it."""
    given = [str(checkpoint), "--quantization", quantization, "--model-type", "gpt2"]
    _mlc_llm("convert_weight", *given, "--output", str(folder))
    window = [] if max_seq_len is None else ["--context-window-size", str(max_seq_len)]
    _mlc_llm("gen_config", *given, "--conv-template", "gpt2", *window, "--output", str(folder))
    _mlc_llm("compile", str(folder / CHAT_CONFIG), "--device", kind, "--output", str(folder / library))
    if not (folder / library).is_file():
        raise UserError(f"mlc_llm compile ended well, but wrote no {library}; is its version another one?")


def _mlc_llm(*arguments: str) -> None:
    command = [sys.executable, "-m", "mlc_llm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise UserError(f"mlc_llm {arguments[0]} failed ({said}); run it by hand: {' '.join(command)}")
