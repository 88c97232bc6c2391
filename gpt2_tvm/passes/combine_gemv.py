"""`combine-gemv`: the sums of split attention are merged in the prologue of the output projection.

Split-KV attention (`kernels/gpu_decode_attention.py`) needs a second kernel that merges the splits. Its work is small,
a few sums for each element of the vector that the projection multiplies, so every block of the projection does it
again and a launch is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, te, tirx

from gpt2_tvm.passes.graph import add_function, arguments, call_tir
from gpt2_tvm.passes.prologues import join_prologues
from gpt2_tvm.schedules.norm_gemv import fits

if TYPE_CHECKING:
    from targets import DeviceTarget

COMBINES = ("decode_attention_combine", "tree_attention_combine")
REDUCTIONS = 3  # maximum, sum of weights, weighted sum of values


def after_fusion(on: bool, target: DeviceTarget) -> Any:
    if not on:
        return None
    tvm_target = target.tvm_target()

    def prepare(mod: tvm.IRModule, producer: Any) -> Any | None:
        parts, _, lengths = arguments(producer.value)
        batch, rows, heads, splits, size = (int(e) for e in parts.ty.shape.values)
        dtype = str(producer.var.ty.dtype)
        values = batch * rows * heads * (size - 2)
        needed = tvm.DataType(dtype).itemsize + 4  # the vector, and the sums that it is made of
        if not fits(values, needed, REDUCTIONS, 2 * batch * rows * heads, tvm_target):
            return None
        shape = (batch, rows, heads, splits, size)
        prim = add_function(mod, "merge_splits", merge_splits(shape, dtype, target.kind))
        var = relax.DataflowVar(str(producer.var.name), producer.var.ty)
        return relax.VarBinding(producer.var, call_tir(prim, [parts, lengths], var.ty))

    return join_prologues("CombineInProduct", COMBINES, prepare)


def merge_splits(shape: tuple[Any, ...], dtype: str, kind: str) -> tirx.PrimFunc:
    """``(parts [B, m, H, S, D + 2] float32, lengths [B], out [B, m, H*D])``: what the kernel that it stands for gives.

    parts: of each split the weighted sum of values, the maximum, and the sum of weights (base 2). A row past its
    sequence's length, or one that looked at nothing, gives zeros. kind: of the target.
    """
    # TVM's CUDA has no word for a vector of conditions; WGSL must not read shared memory behind one.
    choose = tirx.if_then_else if kind == "cuda" else tirx.Select
    dim = shape[4] - 2
    shape = tuple(tirx.IntImm("int64", extent) for extent in shape)  # as Relax has them
    batch, rows, heads, splits, _ = shape
    parts = te.placeholder(shape, "float32", name="parts")
    lengths = te.placeholder((batch,), "int32", name="lengths")

    def axis(name: str) -> Any:
        return te.reduce_axis((0, splits), name=name)

    s, u, v = axis("s"), axis("u"), axis("v")
    top = te.compute((batch, rows, heads), lambda b, t, h: te.max(parts[b, t, h, s, dim], axis=s), name="top")

    def weight(b: Any, t: Any, h: Any, split: Any) -> Any:
        return tirx.exp2(parts[b, t, h, split, dim] - top[b, t, h])

    total = te.compute(
        (batch, rows, heads),
        lambda b, t, h: te.sum(weight(b, t, h, u) * parts[b, t, h, u, dim + 1], axis=u),
        name="total",
    )
    merged = te.compute(
        (batch, rows, heads * dim),
        lambda b, t, e: te.sum(weight(b, t, e // dim, v) * parts[b, t, e // dim, v, e % dim], axis=v),
        name="merged",
    )

    def value(b: Any, t: Any, e: Any) -> Any:
        some = tirx.all(t < lengths[b].astype("int64"), total[b, t, e // dim] > tirx.const(0, "float32"))
        whole = choose(some, total[b, t, e // dim], tirx.const(1, "float32"))
        return choose(some, merged[b, t, e] / whole, tirx.const(0, "float32")).astype(dtype)

    out = te.compute((batch, rows, heads * dim), value, name="out")
    return te.create_prim_func([parts, lengths, out]).with_attr("tirx.noalias", True)
