"""What an artifact's WGSL asks of a WebGPU device: a page compares it with the adapter before it fetches weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from gpt2_tvm.expressions import evaluate
from gpt2_tvm.runners.wgsl import Shader, parse_wgsl
from gpt2_tvm.tensor_cache import INDEX

SHARED = re.compile(r"var<workgroup>\s*\w+\s*:\s*array<(\w+(?:<\w+>)?),\s*(\d+)>")
ELEMENT_BYTES = {"f16": 2, "f32": 4, "i32": 4, "u32": 4, "atomic<u32>": 4, "atomic<i32>": 4}
FEATURES = {"shader-f16": r"^\s*enable f16;", "subgroups": r"^\s*enable subgroups;"}
ONE_TEXT = ("prefill", "decode_b1", "greedy_b1")  # what a page calls
LANES = re.compile(r"vec([234])<(\w+)>")


def device_needs(folder: Path, capacity: int) -> dict[str, Any]:
    """{"features": [name], "limits": {name: number}} in WebGPU's words, for an artifact's folder that has its kernels
    and parameters.

    capacity: tokens of the KV cache. Tensors count that one sequence needs (`ONE_TEXT`); kernels all. A tensor that
    kernels take in windows counts as its windows.
    """
    shaders = list(parse_wgsl((folder / "kernels.wgsl").read_text(encoding="utf-8")).values())
    functions = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))["functions"]
    shards = json.loads((folder / "params" / INDEX).read_text(encoding="utf-8"))["records"]
    sizes = {"b": 1, "n": capacity}
    programs = [functions[name] for name in ONE_TEXT if name in functions]
    inputs = [part for program in programs for given in program["inputs"] for part in _parts(given)]
    params = [record["nbytes"] for shard in shards for record in shard["records"]]  # in the order of their numbers
    bound = max(
        [
            *(
                _bound_bytes(ref, params)
                for program in programs
                for one in program["launches"]
                for ref in one["buffers"]
            ),
            *(math.prod(evaluate(n, sizes) for n in part["shape"]) * _item_bytes(part["dtype"]) for part in inputs),
            *(evaluate(text, sizes) for program in programs for text in program["storages"]),
        ]
    )
    wanted = {
        "maxBufferSize": max(bound, *params),
        "maxStorageBufferBindingSize": bound,
        "maxComputeWorkgroupStorageSize": max(map(shared_bytes, shaders)),
        "maxComputeInvocationsPerWorkgroup": max(math.prod(s.block) for s in shaders),
        "maxStorageBuffersPerShaderStage": max(len(s.bindings) for s in shaders),
        **{f"maxComputeWorkgroupSize{axis}": max(s.block[i] for s in shaders) for i, axis in enumerate("XYZ")},
    }
    asked = [name for name, sign in FEATURES.items() if any(re.search(sign, s.source, re.M) for s in shaders)]
    return {"features": asked, "limits": wanted}


def shared_bytes(shader: Shader) -> int:
    """Bytes of workgroup memory that a kernel declares, each variable rounded up to 16."""
    total = 0
    for element, count in SHARED.findall(shader.source):
        vector = LANES.fullmatch(element)
        # a vector of three takes the place of four
        size = (
            {"2": 2, "3": 4, "4": 4}[vector[1]] * ELEMENT_BYTES[vector[2]] if vector else ELEMENT_BYTES.get(element, 4)
        )
        total += -(-int(count) * size // 16) * 16
    return total


def _bound_bytes(ref: list[Any], params: list[int]) -> int:
    """What a launch binds of a parameter; 0 for other tensors, which count as what they lie in."""
    if ref[0] == "window":
        return int(ref[3])
    return params[ref[1]] if ref[0] == "param" else 0


def _parts(given: Any) -> list[dict[str, Any]]:
    return given if isinstance(given, list) else [given]


def _item_bytes(dtype: str) -> int:
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
