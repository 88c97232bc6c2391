"""The GPU targets' side of `attention.AttentionKernels`: our kernels in `kernels/gpu_*.py`, chosen by shape.

Rows whose number is a shape of the caller's (prefill, score) go through the flash kernel, a block for each tile of
query rows; in float16 on NVIDIA's GPUs from Ampere on through the one on tensor cores. A fixed small number of rows
(decode, verify) would leave a GPU nearly idle that way, so there the keys are split instead: many blocks take a piece
of the context each, and a second launch combines what they found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.attention import Rows
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

if TYPE_CHECKING:
    from targets import DeviceTarget


def _fixed(extent: Any) -> int | None:
    """An extent as an int, None where it is symbolic."""
    if isinstance(extent, int):
        return extent
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None


class GpuKernels:
    """Our GPU kernels for one device's limits; see `attention.AttentionKernels` for what each function does.

    fused_append: with a fixed number of rows `append` emits nothing and `attend` writes the new keys and values
    itself, which saves a launch a layer. Only for callers that attend through this object, so not beneath
    `attention.MaterializedAttention`.
    """

    def __init__(self, limits: GpuLimits, fused_append: bool = False) -> None:
        self.limits = limits
        self.fused_append = fused_append
        self.samples = limits.kind == "cuda"
        self.speculates = limits.kind in ("cuda", "webgpu")

    @classmethod
    def for_target(cls, target: DeviceTarget, fused_append: bool = False) -> GpuKernels:
        """The kernels for what `target` allows one block to use."""
        return cls(GpuLimits.of_target(target.tvm_target()), fused_append)

    def append(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        from gpt2_tvm.kernels.gpu_kv_append import kv_append

        batch, count = _fixed(qkv.shape[0]), _fixed(qkv.shape[1])
        if self.fused_append and batch is not None and count is not None:
            return cache
        func = kv_append(spec, self.limits, batch, count)
        return op.tensor_ir_inplace_op(func, "kv_append", [qkv, rows.positions, rows.lengths, cache], 3, cache)

    def attend(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        batch, count = _fixed(qkv.shape[0]), _fixed(qkv.shape[1])
        if batch is not None and count is not None:
            return self._split(spec, qkv, cache, rows, batch, count)
        if rows.tree is not None:
            raise ValueError("a tree needs a fixed number of sequences and rows")
        from gpt2_tvm.kernels import cuda_prefill_attention, gpu_prefill_attention

        out = Tensor.placeholder([*qkv.shape[:2], spec.width], spec.dtype)
        if cuda_prefill_attention.fits(spec, self.limits):
            func = cuda_prefill_attention.prefill_attention(spec)
        else:
            func = gpu_prefill_attention.prefill_attention(spec, self.limits)
        return op.tensor_ir_op(func, "prefill_attention", [qkv, rows.positions, rows.lengths, cache], out)

    def _split(self, spec: AttentionSpec, qkv: Tensor, cache: Tensor, rows: Rows, batch: int, count: int) -> Tensor:
        """Attention of a few rows a sequence: the pieces of the context, then what combines them."""
        from gpt2_tvm.kernels.gpu_decode_attention import decode_attention

        tree = [rows.tree] if rows.tree is not None else []
        kernels = decode_attention(spec, self.limits, batch, count, bool(tree), self.fused_append)
        name = "tree_attention" if tree else "decode_attention"
        out = Tensor.placeholder([batch, count, spec.width], spec.dtype)
        parts = out if kernels.workspace is None else Tensor.placeholder(list(kernels.workspace), "float32")
        inputs = [qkv, rows.positions, rows.lengths, cache, *tree]
        if self.fused_append:  # the cache is written where it lies, the result is new
            _, parts = op.tensor_ir_inplace_op(kernels.partial, f"{name}_append", inputs, [3, -1], [cache, parts])
        else:
            parts = op.tensor_ir_op(kernels.partial, name, inputs, parts)
        if kernels.combine is None:
            return parts
        return op.tensor_ir_op(kernels.combine, f"{name}_combine", [parts, rows.positions, rows.lengths], out)

    def keep(self, spec: AttentionSpec, cache: Tensor, positions: Tensor, path: Tensor, lengths: Tensor) -> Tensor:
        from gpt2_tvm.kernels.gpu_keep import keep_branch

        func = keep_branch(spec, self.limits, int(path.shape[0]), int(path.shape[1]))
        return op.tensor_ir_inplace_op(func, "keep_branch", [cache, positions, path, lengths], 0, cache)

    def greedy_advance(
        self, logits: Tensor, token: Tensor, positions: Tensor, history: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from gpt2_tvm.kernels.gpu_sampling import greedy_advance

        sizes = (int(logits.shape[0]), int(logits.shape[1]), int(history.shape[1]))
        return op.tensor_ir_inplace_op(
            greedy_advance(*sizes, self.limits),
            "greedy_advance",
            [logits, token, positions, history],
            [1, 2, 3],
            [token, positions, history],
        )

    def sample_advance(
        self, logits: Tensor, settings: Tensor, choice: Tensor, token: Tensor, positions: Tensor, history: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from gpt2_tvm.kernels.gpu_sample import sample_advance

        sizes = (int(logits.shape[0]), int(logits.shape[1]), int(history.shape[1]))
        return op.tensor_ir_inplace_op(
            sample_advance(*sizes, self.limits),
            "sample_advance",
            [logits, settings, choice, token, positions, history],
            [3, 4, 5],
            [token, positions, history],
        )

    def log_prob(self, logits: Tensor, targets: Tensor) -> Tensor:
        from gpt2_tvm.kernels.gpu_sampling import log_prob

        out = Tensor.placeholder(logits.shape[:2], "float32")
        return op.tensor_ir_op(log_prob(int(logits.shape[2]), self.limits), "log_prob", [logits, targets], out)
