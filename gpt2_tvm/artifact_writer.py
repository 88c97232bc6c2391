"""`write_artifact`: a plan and its weights in, the folder that `Engine` loads out."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm import toolchains
from gpt2_tvm.artifact import MLC, write_manifest
from gpt2_tvm.build import Plan, Progress, lower_plan, stored_weights, versions, weight_layout
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.files import replacing_folder, require_room
from gpt2_tvm.mlc.names import mlc_name
from gpt2_tvm.toolchains import web

if TYPE_CHECKING:
    from gpt2_tvm.pipeline import Lowered

OBJECT_BYTES = 16 << 20  # room for the objects of a large model and what is linked from them
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def write_artifact(
    final: Path,
    source: ModelSource,
    plan: Plan,
    lowered: tuple[Lowered, list[str]] | None = None,
    dump_ir: Path | None = None,
    say: Progress = lambda what, share: None,
    weights: bool = True,
    page: bool = True,
    adapter: Sequence[str] | None = None,
) -> None:
    """`compile_model` from a plan on.

    lowered: of `lower_plan`, where it is at hand. adapter: what the one WebGPU adapter that will run this meets
    (`wgpu_device.Device.meets`), so that kernels for others are left out. Other arguments as there.
    """
    with replacing_folder(final) as work:
        seconds = _fill(work, source, plan, lowered, dump_ir, say, weights, page, adapter)
    say(f"wrote {final} in {seconds:.1f} s", 1.0)


def _fill(
    work: Path,
    source: ModelSource,
    plan: Plan,
    ready: tuple[Lowered, list[str]] | None,
    dump_ir: Path | None,
    say: Progress,
    weights: bool,
    page: bool,
    adapter: Sequence[str] | None,
) -> float:
    """Fill the folder of an artifact; returns the seconds it took."""
    from gpt2_tvm.inventory import function_table
    from gpt2_tvm.passes.cuda_graph import graph_steps
    from gpt2_tvm.tensor_cache import TensorCacheWriter

    start = time.perf_counter()
    toolchains.prepare(plan.target)
    say("importing TVM", 0.02)

    told: dict[str, Any] | None = None  # what an engine of MLC's asks the library for
    in_a_page = plan.interface == MLC and plan.target.kind == "webgpu"  # no other program could run it
    with toolchains.compiling(plan.target) as tvm_target:
        say("lowering and scheduling", 0.1)
        if ready is not None:
            lowered, names = ready
        elif plan.interface == MLC:
            from gpt2_tvm.mlc.lowering import lower_paged

            lowered, told = lower_paged(plan, dump_ir)
            names = [one["name"] for one in told["params"]]
        else:
            lowered, names = lower_plan(plan, dump_ir)
        say(f"building {len(lowered.hits)} functions for {plan.target.name}", 0.3)
        for folder in (Path(tempfile.gettempdir()), work):
            require_room(folder, OBJECT_BYTES)  # LLVM ends the process when it cannot write
        if not in_a_page:
            executable = toolchains.build(lowered.final, tvm_target)
            libraries = toolchains.export(executable, plan.target, work)
    if in_a_page:
        say(f"linking {web.MODULE}", 0.5)
        web.link_module(lowered.final, plan.target, work, lambda what: say(what, 0.0))
        libraries = [web.MODULE]
    elif plan.target.kind == "webgpu":
        from gpt2_tvm.kernel_list import write_kernel_list

        write_kernel_list(work, lowered, plan, adapter)
        if page:
            say(f"linking {web.MODULE}", 0.5)
            libraries += web.write_module(lowered.final, plan.target, work, lambda what: say(what, 0.0))
    compile_seconds = time.perf_counter() - start

    total = sum(1 for _ in names)
    with TensorCacheWriter(work / "params") as writer:
        for i, (name, array) in enumerate(stored_weights(source, plan) if weights else ()):
            say(f"converting weights: {name}", 0.6 + 0.38 * i / total)
            name = name if told is None else mlc_name(name, array.dtype.name, plan.scheme)
            if i >= total or names[i] != name:
                raise RuntimeError(
                    f"parameter {i} is {name}, the module expects {names[i] if i < total else 'no more'}"
                )
            writer.add(name, array)
    if source.folder is not None:
        _copy_tokenizer(source.folder, work / "tokenizer")
    say("writing the manifest", 0.99)
    seconds = time.perf_counter() - start
    manifest: dict[str, Any] = {
        "model": source.name,
        "config": json.loads(plan.config.to_json()),
        "random_weights": source.random,
        "seed": source.seed if source.random else None,
        "quantization": plan.scheme.name,
        "target": plan.target.to_json(),
        "layout": asdict(weight_layout(plan.target)),
        "rules": list(plan.rules),
        "passes": list(plan.passes or ()),
        "attention": plan.attention,
        "streams": plan.streams.to_json() if plan.streams is not None else None,
        "tuned": plan.tuned.to_json() if plan.tuned is not None else None,
        "batch_sizes": list(plan.batch_sizes),
        "verify_widths": list(plan.verify_widths),
        "max_seq_len": plan.max_seq_len,
        "cuda_graph": graph_steps(lowered.lowered) if plan.cuda_graph else None,
        **({} if in_a_page else web.manifest(plan.target, work, plan.max_seq_len)),
        "interface": plan.interface,
        "mlc": told,
        "versions": versions(),
        "library": libraries[0],
        "libraries": libraries,
        "params": names,
        "compile_seconds": round(compile_seconds, 2),
        "total_seconds": round(seconds, 2),
        **function_table(lowered, plan),
    }
    write_manifest(work, manifest)
    return seconds


def _copy_tokenizer(source: Path, folder: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if any(f.name in ("vocab.json", "tokenizer.json") for f in found):
        folder.mkdir()
        for file in found:
            shutil.copyfile(file, folder / file.name)
