"""The CUDA source of a persistent step: the files beside this one, behind the sizes of one `StepShape`."""

from __future__ import annotations

from pathlib import Path

from gpt2_tvm.kernels.persistent.shape import OF_LAYER, OF_MODEL, StepShape

FUNCTION = "gpt2_persistent_step"
FILES = ("primitives.cuh", "stream.cuh", "attention.cuh", "step.cuh")
ACTIVATIONS = {
    "gelu_new": "0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)))",
    "gelu": "0.5f * v * (1.f + erff(v * 0.7071067811865476f))",
    "relu": "v < 0.f ? 0.f : v",
    "silu": "v / (1.f + expf(-v))",
    "tanh": "tanhf(v)",
}


def cuda_source(shape: StepShape) -> str:
    """Device functions, the last of them `FUNCTION`: its arguments are the kernel's buffers in the order of
    `kernel.persistent_step`, then the block's shared memory."""
    files = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in FILES]
    return "\n".join([_sizes(shape), *files, _entry(shape)])


def _float(value: float) -> str:
    return f"{value!r}f"


def _sizes(shape: StepShape) -> str:
    c, half = shape.config, shape.dtype == "float16"
    sizes = {
        "EMBED": c.n_embd,
        "HEADS": c.n_head,
        "HEAD_DIM": c.head_dim,
        "INNER": c.n_inner,
        "LAYERS": c.n_layer,
        "VOCAB": c.vocab_size,
        "POSITIONS": c.n_positions,
        "CAPACITY": shape.capacity,
        "GRID": shape.grid,
        "THREADS": shape.threads,
        "PACKET": shape.packet,
        "DEPTH": shape.depth,
        "SPLITS": shape.splits,
        "A_THREAD": -(-c.n_embd // shape.threads),
    }
    first = _float(shape.scale(0))
    scale = f"{first} / (layer + 1)" if c.scale_attn_by_inverse_layer_idx else first
    return "\n".join(
        [
            "// gpt2_tvm: a persistent decode step",
            *(["#define GPT2_STEP_HALF"] if half else []),
            "#ifndef GPT2_STEP_SPIN  // what a thread does while it waits for other blocks",
            "#define GPT2_STEP_SPIN",
            "#endif",
            "namespace gpt2_step {",
            *(f"constexpr int {name} = {size};" for name, size in sizes.items()),
            f"constexpr float EPSILON = {_float(c.layer_norm_epsilon)};",
            f"typedef {'half' if half else 'float'} number;",
            f"__device__ __forceinline__ float scale_of(int layer) {{ return {scale}; }}",
            f"__device__ __forceinline__ float activated(float v) {{ return {ACTIVATIONS[c.activation_function]}; }}",
            "}",
            "",
        ]
    )


def _entry(shape: StepShape) -> str:
    """The function that the kernel calls: pointers into the table, places into shared and global memory."""
    c, warps = shape.config, shape.threads // 32
    of_model = ["tokens", "places", "norm_weight", "norm_bias", *(() if c.tie_word_embeddings else ("head",))]
    of_layer = [[f"l{i}_{j}" for j in range(OF_LAYER - 1)] for i in range(c.n_layer)]
    caches = [f"cache{i}" for i in range(c.n_layer)]
    pointers = [*(name for names in of_layer for name in names), *of_model, *caches]
    arguments = [f"const int *{name}" for name in ("ids", "positions", "lengths")]
    arguments += [f"const void *{name}" for name in pointers]
    arguments += ["float *logits", "float *work", "void *shared"]
    fill = []
    for i, names in enumerate([*of_layer, of_model if len(of_model) == OF_MODEL else [*of_model, "tokens"]]):
        values = [*names, caches[i]] if i < c.n_layer else names
        stores = " ".join(f"pointers[{i * OF_LAYER + j}] = {name};" for j, name in enumerate(values))
        fill.append(f"  if (threadIdx.x == {i % warps * 32}) {{ {stores} }}")
    return "\n".join(
        [
            f"__device__ __forceinline__ void {FUNCTION}({', '.join(arguments)}) {{",
            "  unsigned char *at = static_cast<unsigned char *>(shared);",
            *(f"  unsigned char *{name} = at; at += {size};" for name, size in shape.areas.items()),
            *(f"  float *work_{name} = work; work += {size};" for name, size in shape.work.items()),
            "  const void **pointers = reinterpret_cast<const void **>(table);",
            *fill,
            "  __syncthreads();",
            f"  const gpt2_step::Work global = {{{', '.join(f'work_{name}' for name in shape.work)}}};",
            "  const gpt2_step::Shared local = {at, (float *)residual, (float *)x, (float *)factors, (float *)meet};",
            "  gpt2_step::run(pointers, ids, positions, lengths, logits, global, local);",
            "}",
            "",
        ]
    )
