"""The attention call of the model: which kernels a target has, behind one interface.

The model (`model.py`) says *append these keys and values, then attend*; here that becomes calls of the target's
kernels. Everything a kernel must know about where the sequences stand comes as tensors on the device (`Rows`), never as
shapes: so decode has only static shapes, and one step can be recorded once (a CUDA graph, a WebGPU command buffer) and
replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.kernels.spec import AttentionSpec


@dataclass(frozen=True)
class Rows:
    """Where the rows of one call stand; all int32 on the device.

    positions [b]: tokens of each sequence already in the cache · lengths [b]: valid rows of this call, the rest is
    right padding (0: the sequence takes no part) · tree [b, n]: for a tree of candidates, bit j of tree[b, t] says that
    row t sees row j · depths [b, n]: distance of row t from positions[b] in its branch (t itself for a chain, then
    None).
    """

    positions: Tensor
    lengths: Tensor
    tree: Tensor | None = None
    depths: Tensor | None = None


class AttentionKernels(Protocol):
    """What a target must bring; every function emits kernel calls into the function being built."""

    def append(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        """Write k and v of the valid rows into the cache, in place; returns the same cache."""
        ...

    def attend(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        """[b, n, 3*H*D] and the cache -> [b, n, H*D]."""
        ...

    def keep(self, spec: AttentionSpec, cache: Tensor, positions: Tensor, path: Tensor, lengths: Tensor) -> Tensor:
        """Move the slots of one branch of a tree to the front, in place."""
        ...

    def greedy_advance(
        self, logits: Tensor, token: Tensor, positions: Tensor, history: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Argmax into token, positions + 1, token remembered in history; all three in place."""
        ...

    speculates: bool  # whether a round of speculation ends on the device (`speculation`): where a read-back is dear
    samples: bool  # whether there is `sample_advance`: where a step is replayed, and a draw on the host would break it

    def sample_advance(
        self, logits: Tensor, settings: Tensor, choice: Tensor, token: Tensor, positions: Tensor, history: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`greedy_advance` with a draw (kernels/gpu_sample.py)."""
        ...

    def log_prob(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[b, n, V] float32, [b, n] int32 -> [b, n] float32."""
        ...


class CpuKernels:
    """Our CPU kernels (`kernels/cpu_*.py`)."""

    samples = False
    speculates = False

    def __init__(self, simd_bits: int) -> None:
        self.simd_bits = simd_bits

    def append(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        from gpt2_tvm.kernels.cpu_cache import kv_append

        func = kv_append(spec)
        return op.tensor_ir_inplace_op(func, "kv_append", [qkv, rows.positions, rows.lengths, cache], 3, cache)

    def attend(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        from gpt2_tvm.kernels.cpu_attention import attention

        tree = rows.tree is not None
        func = attention(spec, self.simd_bits, tree)
        name = "tree_attention" if tree else "chain_attention"
        extra = [rows.tree] if tree else []
        out = Tensor.placeholder([*qkv.shape[:2], spec.n_head * spec.head_dim], spec.dtype)
        return op.tensor_ir_op(func, name, [qkv, rows.positions, rows.lengths, cache, *extra], out)

    def keep(self, spec: AttentionSpec, cache: Tensor, positions: Tensor, path: Tensor, lengths: Tensor) -> Tensor:
        from gpt2_tvm.kernels.cpu_cache import keep_branch

        func = keep_branch(spec, int(path.shape[0]), int(path.shape[1]))
        return op.tensor_ir_inplace_op(func, "keep_branch", [cache, positions, path, lengths], 0, cache)

    def greedy_advance(
        self, logits: Tensor, token: Tensor, positions: Tensor, history: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from gpt2_tvm.kernels.cpu_sampling import greedy_advance

        func = greedy_advance(int(logits.shape[0]), int(logits.shape[1]), int(history.shape[1]))
        return op.tensor_ir_inplace_op(
            func,
            "greedy_advance",
            [logits, token, positions, history],
            [1, 2, 3],
            [token, positions, history],
        )

    def sample_advance(self, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a CPU draws on the host")

    def log_prob(self, logits: Tensor, targets: Tensor) -> Tensor:
        from gpt2_tvm.kernels.cpu_sampling import log_prob

        out = Tensor.placeholder(logits.shape[:2], "float32")
        return op.tensor_ir_op(log_prob(int(logits.shape[2])), "log_prob", [logits, targets], out)


class MaterializedAttention:
    """Plain attention for the rules to schedule: matmul, softmax, matmul, with the whole matrix of scores in memory.

    Wraps a target's kernels: the append stays theirs. The key axis is the cache's capacity, masked by position, because
    the position lives on the device and cannot be a shape; compile with --max-seq-len near the length in use for a fair
    comparison.
    """

    def __init__(self, kernels: AttentionKernels) -> None:
        self.kernels = kernels
        self.append = kernels.append
        self.keep = kernels.keep
        self.greedy_advance = kernels.greedy_advance
        self.log_prob = kernels.log_prob
        self.samples = kernels.samples
        self.speculates = kernels.speculates
        self.sample_advance = kernels.sample_advance

    def attend(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        H, D, S = spec.n_head, spec.head_dim, spec.capacity
        b, n = qkv.shape[:2]

        def head_part(x: te.Tensor, part: int, name: str) -> te.Tensor:
            if part == 0:  # queries, from [b, n, 3*H*D]
                return te.compute((b, H, n, D), lambda i, h, t, d: x[i, t, h * D + d], name=name)
            return te.compute((b, H, S, D), lambda i, h, s, d: x[part - 1, i, h, s, d], name=name)

        def masked(scores: te.Tensor, positions: te.Tensor, lengths: te.Tensor, *tree: te.Tensor) -> te.Tensor:
            def value(i: tirx.Var, h: tirx.Var, t: tirx.Var, s: tirx.Var) -> tirx.Expr:
                pos = positions[i].astype("int64")
                if tree:
                    row = tirx.min(tirx.max(s - pos, 0), 31).astype("int32")
                    bit = tirx.bitwise_and(tirx.shift_right(tree[0][i, t], row), tirx.const(1, "int32"))
                    sees = tirx.any(s < pos, tirx.all(s < pos + lengths[i].astype("int64"), bit == 1))
                else:
                    sees = s <= pos + t
                return tirx.Select(
                    sees, scores[i, h, t, s] * tirx.const(spec.scale, "float32"), tirx.const(-1e30, "float32")
                )

            return te.compute((b, H, n, S), value, name="masked_scores")

        def merged(x: te.Tensor, lengths: te.Tensor) -> te.Tensor:
            return te.compute(
                (b, n, H * D),
                lambda i, t, e: tirx.Select(
                    t < lengths[i].astype("int64"), x[i, e // D, t, e % D], tirx.const(0, spec.dtype)
                ),
                name="merge_heads",
            )

        q = op.tensor_expr_op(lambda x: head_part(x, 0, "queries"), "split_queries", [qkv])
        k = op.tensor_expr_op(lambda x: head_part(x, 1, "keys"), "read_keys", [cache])
        v = op.tensor_expr_op(lambda x: head_part(x, 2, "values"), "read_values", [cache])
        scores = op.matmul(q, op.permute_dims(k, [0, 1, 3, 2]), out_dtype="float32")  # [b, H, n, S]
        tree = [rows.tree] if rows.tree is not None else []
        scores = op.tensor_expr_op(masked, "mask_scores", [scores, rows.positions, rows.lengths, *tree])
        weights = op.softmax(scores, axis=-1).astype(spec.dtype)
        y = op.matmul(weights, v, out_dtype="float32").astype(spec.dtype)  # [b, H, n, D]
        return op.tensor_expr_op(merged, "merge_heads", [y, rows.lengths])
