"""`python -m gpt2_tvm.import_mlc`: a model that mlc-llm converted, as a checkpoint that every command here takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.chat_config import ACTIVATION, CHAT_CONFIG
from gpt2_tvm.mlc.names import SCALES, WEIGHT, WORDS

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(add_completion=False, rich_markup_mode=None)

SCHEMES = {  # that can be imported, and the dtype in which a checkpoint holds each without a loss
    "q0f16": "float16",
    "q0bf16": "bfloat16",
    "q0f32": "float32",
    "q4f16_1": "float32",
    "q4f32_1": "float32",
}
FIELDS = (
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "layer_norm_epsilon",
    "scale_attn_by_inverse_layer_idx",
)
OURS = ("scale_attn_weights", "activation_function")  # written by export_mlc; mlc-llm's own definition has one of each
POSITIONS = "transformer.wpe"
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@app.command()
def main(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Made by mlc_llm convert_weight and gen_config, or by export_mlc.")
    ],
    output: Annotated[Path, typer.Option(help="The checkpoint's folder, in Hugging Face layout.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what is printed at the end as JSON.")] = None,
) -> None:
    """Turn weights in mlc-llm's layout into a checkpoint in Hugging Face layout.

    Weights of 4 bits become the float32 numbers that they stand for: compiled with the same --quantization, the
    matrices get the same bits again.

    \b
    python -m gpt2_tvm.import_mlc ./gpt2-q4f16_1-MLC --output ./my-gpt2
    python -m gpt2_tvm.compile --model ./my-gpt2 --quantization q4f16_1
    """
    made = import_folder(folder, output)
    head = "tied" if made["tied"] else "with a head of its own"
    print(f"{made['folder']}: GPT-2 of {made['parameters'] / 1e6:.1f} M parameters, {head}, {made['dtype']}")
    print(f"  next   python -m gpt2_tvm.compile --model {made['folder']} --quantization {made['quantization']}")
    if json_file:
        write_json(json_file, made)


def import_folder(folder: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the checkpoint -> a summary: folder · quantization (what it was converted with) · dtype (of the
    checkpoint) · tied · parameters.

    A head that equals the token table, which mlc-llm writes twice, is tied again. Raises UserError for a folder that is
    not GPT-2's, a scheme that is not among `SCHEMES`, weights that are damaged, missing or misshapen, and an `output`
    that holds something else.
    """
    from gpt2_tvm.files import replacing_folder
    from gpt2_tvm.weights import EMBEDDING, HEAD, expected_tensors, write_hf_checkpoint

    source = Path(folder)
    chat = _read_config(source)
    scheme = str(chat["quantization"])
    if scheme not in SCHEMES:
        raise UserError(f"{source} is quantised as {scheme}; those that can be imported are {', '.join(SCHEMES)}")
    config = _config(source, chat, tied=False)
    weights = dict(_matrices(source, expected_tensors(config)))
    tied = HEAD not in weights or np.array_equal(weights[HEAD], weights.get(EMBEDDING, np.zeros(0)))
    if tied:
        config = _config(source, chat, tied=True)
        weights.pop(HEAD, None)
    _check(source, weights, expected_tensors(config))
    dtype = SCHEMES[scheme]
    with replacing_folder(Path(output), "config.json") as work:
        write_hf_checkpoint(work, config, weights.items(), dtype)
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
    return {
        "folder": str(output),
        "quantization": scheme,
        "dtype": dtype,
        "tied": tied,
        "parameters": config.num_parameters(),
    }


def _read_config(source: Path) -> dict[str, Any]:
    path = source / CHAT_CONFIG
    if not path.is_file():
        raise UserError(f"{source} has no {CHAT_CONFIG}; give a folder made by mlc_llm convert_weight and gen_config")
    try:
        chat = json.loads(path.read_text(encoding="utf-8"))
        found = chat["model_type"], chat["quantization"], chat["model_config"]["n_embd"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); make it again with mlc_llm") from None
    if found[0] != "gpt2":
        raise UserError(f"{source} is a {found[0]}, not a gpt2; this project runs GPT-2 alone")
    return dict(chat)


def _config(source: Path, chat: dict[str, Any], tied: bool) -> GPT2Config:
    """The shape. Positions are as many as the table has: a context window may be smaller."""
    given = chat["model_config"]
    missing = [name for name in FIELDS if name not in given]
    if missing:
        raise UserError(
            f"{source / CHAT_CONFIG} lacks model_config.{missing[0]}; make it again with mlc_llm gen_config"
        )
    from gpt2_tvm.mlc.tensors import stored_shapes

    shapes = stored_shapes(source)
    table = next((shapes[POSITIONS + end] for end in (WEIGHT, WORDS) if POSITIONS + end in shapes), None)
    if table is None:
        raise UserError(f"the weights in {source} lack {POSITIONS}{WEIGHT}; convert them again with mlc_llm")
    extra = {name: given[name] for name in OURS if name in given}
    values = {
        "model_type": "gpt2",
        "activation_function": ACTIVATION,
        "n_positions": table[0],
        "tie_word_embeddings": tied,
        "bos_token_id": chat.get("bos_token_id"),
        "eos_token_id": chat.get("eos_token_id"),
        **{name: given[name] for name in FIELDS},
        **extra,
    }
    return GPT2Config.from_json(values)


def _matrices(source: Path, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """(our name, array) of each parameter, of 4 bits as float32; pairs of words and scales are put together."""
    from gpt2_tvm.mlc.tensors import read_tensors
    from gpt2_tvm.quantization.groups import dequantise_groups, groups_of, words_of

    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read_tensors(source):
        suffix = next((end for end in (WORDS, SCALES) if name.endswith(end)), None)
        if suffix is None:
            yield name, _plain(name, array, expected)
            continue
        matrix = name.removesuffix(suffix) + WEIGHT
        pair = halves.setdefault(matrix, {})
        pair[suffix] = array
        if len(pair) < 2:
            continue
        if matrix not in expected:
            raise UserError(f"{source} holds {name}, which a GPT-2 of its {CHAT_CONFIG} does not have")
        n, k = expected[matrix]
        words, scales = (_rows(pair[end], n) for end in (WORDS, SCALES))
        if words.shape != (n, words_of(k)) or scales.shape != (n, groups_of(k)) or words.dtype != np.uint32:
            raise UserError(
                f"{matrix}: words {list(words.shape)} and scales {list(scales.shape)} are not those of [{n}, {k}] in "
                f"groups of 32; is {CHAT_CONFIG} another model's?"
            )
        yield matrix, dequantise_groups(words, scales, k)
        del halves[matrix]
    if halves:
        raise UserError(f"{source}: of {next(iter(halves))} there is only one half, words or scales; convert it again")


def _rows(array: np.ndarray, n: int) -> np.ndarray:
    """[N, …] of an array that `export_mlc` may have written in panels for a CPU, [P, …, rows of a panel]."""
    return array.transpose(0, 2, 1).reshape(-1, array.shape[1])[:n] if array.ndim == 3 else array


def _plain(name: str, array: np.ndarray, expected: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    shape = expected.get(name)
    return _rows(array, shape[0]) if shape is not None else array


def _check(source: Path, weights: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError that names what does not fit."""
    faults = [f"missing {name}" for name in expected if name not in weights]
    faults += [f"unexpected {name}" for name in weights if name not in expected]
    for name, array in weights.items():
        if name in expected and array.shape != expected[name]:
            faults.append(f"{name} is {list(array.shape)} instead of {list(expected[name])}")
        elif not np.isfinite(array.astype(np.float32)).all():
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"the weights in {source} do not fit its {CHAT_CONFIG}: {'; '.join(faults[:4])}{more}")


if __name__ == "__main__":
    run(app)
