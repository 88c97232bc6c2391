"""A checkpoint as the GGUF file that llama.cpp loads: its tensor names, its types, no tokenizer.

Matrices are stored as `kind` says; vectors and the position table stay float32, as llama.cpp's own converter leaves
them. A tied head is written a second time as `output.weight`: llama.cpp can do without, but then cannot lay it out for
its matrix kernels, since the same tensor serves as the token table.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.weights import EMBEDDING

KINDS = ("f32", "f16", "q8_0")
POSITIONS = "position_embd.weight"
BLOCK = 32  # weights that share a scale in q8_0


def write_gguf(path: Path, config: GPT2Config, weights: Iterable[tuple[str, np.ndarray]], kind: str) -> Path:
    """Write `weights` (our names and shapes, float32) to `path`; kind: one of `KINDS`. Returns `path`.

    In q8_0, a matrix whose rows are no multiple of 32 long is stored in float16, as llama.cpp's quantiser does. Raises
    ValueError for a name that GPT-2 does not have in llama.cpp.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # ids go in and come out
    for name, array in weights:
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"llama.cpp's gpt2 has no tensor for {name}")
        data, stored_as = _stored(theirs, array, kind)
        writer.add_tensor(theirs, data, raw_dtype=stored_as)
        if name == EMBEDDING and config.tie_word_embeddings:
            writer.add_tensor("output.weight", data, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(name: str, array: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """The bytes of a tensor and their type."""
    import gguf

    types = gguf.GGMLQuantizationType
    stored_as = {"f32": types.F32, "f16": types.F16, "q8_0": types.Q8_0}[kind]
    if array.ndim == 1 or name == POSITIONS:
        stored_as = types.F32
    elif stored_as == types.Q8_0 and array.shape[-1] % BLOCK:
        stored_as = types.F16
    return gguf.quants.quantize(np.ascontiguousarray(array, np.float32), stored_as), stored_as
