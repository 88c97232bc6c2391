"""The persistent step as a PrimFunc: one cooperative kernel, whose body is a call of our CUDA function.

What TIR says here is what TVM and the rest of this project need of a kernel: its buffers, grid, block and shared
memory, and that its launch is cooperative. TVM passes that on to `cuLaunchKernelEx`, and CUDA then refuses a grid whose
blocks would not all be resident (a GPU smaller than the target's, a MIG slice): an error in place of a hang.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as build
from tvm.tirx import IntImm, PrimFunc

from gpt2_tvm.host_code import COOPERATIVE
from gpt2_tvm.kernels.persistent.shape import RULE, StepShape
from gpt2_tvm.kernels.persistent.source import FUNCTION, cuda_source

# A block of this kernel has its multiprocessor to itself. Unless told, ptxas leaves registers for a second, and spills.
ONE_BLOCK = "tirx.launch_bounds_min_blocks_per_sm"


def parameter_shapes(shape: StepShape) -> list[tuple[str, tuple[int, ...]]]:
    """Names, as in Hugging Face, and shapes of the weights, in the order in which the kernel takes them."""
    c = shape.config
    E, N = c.n_embd, c.n_inner
    found: list[tuple[str, tuple[int, ...]]] = []
    for i in range(c.n_layer):
        of_layer: list[tuple[str, tuple[int, ...]]] = [
            *((f"ln_1.{part}", (E,)) for part in ("weight", "bias")),
            *(("attn.c_attn.weight", (3 * E, E)), ("attn.c_attn.bias", (3 * E,))),
            *(("attn.c_proj.weight", (E, E)), ("attn.c_proj.bias", (E,))),
            *((f"ln_2.{part}", (E,)) for part in ("weight", "bias")),
            *(("mlp.c_fc.weight", (N, E)), ("mlp.c_fc.bias", (N,))),
            *(("mlp.c_proj.weight", (E, N)), ("mlp.c_proj.bias", (E,))),
        ]
        found += [(f"transformer.h.{i}.{name}", size) for name, size in of_layer]
    found += [("transformer.wte.weight", (c.vocab_size, E)), ("transformer.wpe.weight", (c.n_positions, E))]
    found += [(f"transformer.ln_f.{part}", (E,)) for part in ("weight", "bias")]
    return found if c.tie_word_embeddings else [*found, ("lm_head.weight", (c.vocab_size, E))]


def work_elements(shape: StepShape) -> int:
    """float32 elements of the kernel's own memory."""
    return sum(shape.work.values())


@cache
def persistent_step(shape: StepShape) -> PrimFunc:
    """``(ids [1, 1], positions [1], lengths [1], weights ..., caches [2, 1, H, S, D] ..., logits [1, 1, V],
    work [n])``: integers int32, weights (`parameter_shapes`) and caches of the shape's dtype, logits and work float32.

    What `decode` computes for one sequence: the new keys and values go to slot positions[0] of the caches, in place
    (lengths 0: nowhere, and attention is 0). work: scratch, of `work_elements`.
    """
    c = shape.config
    with IRBuilder() as builder, build.prim_func(is_private=True, s_tir=True):
        build.func_name("persistent_step")

        def argument(name: str, size: tuple[int, ...], dtype: str) -> Any:
            return build.arg(name, build.Buffer(size, dtype))

        buffers = [argument("ids", (1, 1), "int32")]
        buffers += [argument(name, (1,), "int32") for name in ("positions", "lengths")]
        for name, size in parameter_shapes(shape):
            buffers.append(argument(name.removeprefix("transformer.").replace(".", "_"), size, shape.dtype))
        for i in range(c.n_layer):
            size = (2, 1, c.n_head, shape.capacity, c.head_dim)
            buffers.append(argument(f"cache_{i}", size, shape.dtype))
        buffers.append(argument("logits", (1, 1, c.vocab_size), "float32"))
        buffers.append(argument("work", (work_elements(shape),), "float32"))
        build.func_attr(
            {
                "tirx.is_scheduled": True,
                "tirx.noalias": True,
                "tirx.kernel_launch_params": [COOPERATIVE],
                "op_pattern": 8,
                "scheduled_by": RULE,
            }
        )
        shared = build.sblock_alloc_buffer((shape.shared_bytes,), "uint8", scope="shared.dyn")
        one = IntImm("int32", 1)
        with (
            build.thread_binding(0, shape.grid, "blockIdx.x"),
            build.thread_binding(0, shape.threads, "threadIdx.x"),
            build.attr(IntImm("int32", 0), ONE_BLOCK, one),
        ):
            given = [buffer.data for buffer in (*buffers, shared)]
            build.evaluate(cuda_func_call(FUNCTION, *given, source_code=cuda_source(shape)))
    return builder.get()
