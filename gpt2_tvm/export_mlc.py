"""`python -m gpt2_tvm.export_mlc`: the folder that mlc-llm and web-llm load, from an artifact with their interface."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.tokenizer import Tokenizer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TOKENIZER = "tokenizer.json"
RECORD = "web-llm.json"  # for pages: the entry of web-llm's model list, relative to the folder
COPIED = ("vocab.json", "merges.txt", "tokenizer_config.json")


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="Made with compile --interface mlc.")],
    output: Annotated[
        Path, typer.Option(help="The folder; an earlier export that is there is replaced once the new one is whole.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what is printed at the end as JSON.")] = None,
) -> None:
    """Write mlc-chat-config.json, tensor-cache.json with its shards, the tokenizer and the library into one folder.

    \b
    python -m gpt2_tvm.compile --model bundled --target webgpu --interface mlc --output artifacts/austen-mlc
    python -m gpt2_tvm.export_mlc artifacts/austen-mlc --output ./austen
    python -m gpt2_tvm.mlc.page ./austen        a page with web-llm that loads it

    web-llm takes web-llm.json, with addresses in front, as an entry of its model list; mlc-llm takes the folder and, as
    its model_lib, the library in it.
    """
    made = export(artifact, output)
    print(f"{made['folder']}: {made['record']['model_id']}, {made['size_mb']:.1f} MB")
    for name, what in made["files"].items():
        print(f"  {name:<28} {what}")
    print(f"  next   {made['next']}")
    if json_file:
        write_json(json_file, made)


def export(artifact: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the folder -> a summary: folder · library · size_mb · files, {name: what it is} · record, an entry of
    web-llm's model list whose addresses are relative to the folder · next, what to do with it.

    Raises UserError for an artifact that is damaged, has another interface or no tokenizer, and for an `output` that
    is not an earlier export.
    """
    from gpt2_tvm.artifact import MLC, open_artifact
    from gpt2_tvm.files import replacing_folder
    from gpt2_tvm.mlc.chat_config import CHAT_CONFIG, chat_config
    from gpt2_tvm.tokenizer import load_tokenizer

    opened = open_artifact(artifact, versions=False, interface=MLC)
    if opened.tokenizer is None:
        raise UserError(
            f"{opened.path} has no tokenizer, which MLC's engines need; put vocab.json and merges.txt, or {TOKENIZER}, "
            "into the checkpoint's folder and compile it again"
        )
    told, final = opened.manifest["mlc"], Path(output)
    name = f"{opened.manifest['model']}-{told['quantization']}"
    in_pages = opened.kind == "webgpu"
    library = f"{name}-{opened.kind}{opened.library.suffix}"
    tokenizer = load_tokenizer(opened.tokenizer)
    with replacing_folder(final, CHAT_CONFIG) as folder:
        shutil.copyfile(opened.library, folder / library)
        for file in sorted(opened.params.iterdir()):
            shutil.copyfile(file, folder / file.name)
        files = [TOKENIZER, *(one for one in COPIED if (opened.tokenizer / one).is_file())]
        (folder / TOKENIZER).write_text(tokenizer_json(tokenizer), encoding="utf-8")
        for one in files[1:]:
            shutil.copyfile(opened.tokenizer / one, folder / one)
        content = chat_config(opened.config, told, tokenizer.eos_id, tokenizer.vocab_size, files)
        (folder / CHAT_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        entry = record(opened, f"{name}-MLC", library)
        if in_pages:
            (folder / RECORD).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    shards = sorted(file.name for file in final.glob("params_shard_*.bin"))
    return {
        "folder": str(final),
        "library": library,
        "size_mb": round(size / 1e6, 2),
        "files": {
            CHAT_CONFIG: "the model, its limits, and a template of plain completion",
            "tensor-cache.json": f"{len(told['params'])} parameters in {len(shards)} shards",
            TOKENIZER: f"{tokenizer.vocab_size} tokens",
            library: f"the functions of MLC's interface, for {opened.manifest['target']['name']}",
        },
        "record": entry,
        "next": f"python -m gpt2_tvm.mlc.page {final}" if in_pages else f"mlc_llm serve {final} --model-lib {library}",
    }


def record(artifact: Artifact, model_id: str, library: str) -> dict[str, Any]:
    """An entry of web-llm's `appConfig.model_list`; `model` and `model_lib` are relative to the exported folder."""
    from gpt2_tvm.tensor_cache import INDEX

    shards = json.loads((artifact.params / INDEX).read_text(encoding="utf-8"))["records"]
    told = artifact.manifest["mlc"]
    cache = told["kv_cache"]
    item = 2 if artifact.manifest["compute_dtype"] == "float16" else 4
    tokens = told["context_window_size"]
    kept = 2 * cache["num_hidden_layers"] * cache["num_key_value_heads"] * cache["head_dim"] * tokens * item
    weights = sum(shard["nbytes"] for shard in shards)
    return {
        "model": ".",
        "model_id": model_id,
        "model_lib": library,
        "vram_required_MB": round((weights + kept + max(told["memory_usage"].values())) / 1e6, 1),
        "buffer_size_required_bytes": max(r["nbytes"] for shard in shards for r in shard["records"]),
        "required_features": ["shader-f16"] if item == 2 else [],
        "overrides": {"context_window_size": tokens},
    }


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer as one file. Its merges are written as texts ("a b"), which the tokenizers inside web-llm and
    mlc-llm read; those of today write pairs."""
    content = json.loads(tokenizer.to_json())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    return json.dumps(content, ensure_ascii=False)


if __name__ == "__main__":
    run(app)
