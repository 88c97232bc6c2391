"""`dequantize-gemv`: a quantised weight is spread where it is multiplied, in registers or a tile of shared memory.

That is how the model is written (`kernels/dequantise.py`, `kernels/packed_linear.py`): where the pass is on there is
nothing to do. Off, the two are taken apart: one function writes the whole matrix of floats to memory, a plain product
reads it back. Nobody wants that; it is what the fusion is measured against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, s_tir, te, tirx

from gpt2_tvm.kernels.dequantise import nibble
from gpt2_tvm.kernels.packed_linear import packed_matmul
from gpt2_tvm.passes.graph import add_function, arguments, bindings, call_tir, callee, calls, rewriting, with_bindings
from gpt2_tvm.quantization.groups import A_WORD, GROUP, ZERO

if TYPE_CHECKING:
    from targets import DeviceTarget

PRODUCT, OPAQUE = 4, 8  # op_pattern: a product that elementwise operators may follow; a function that nothing joins
NAME = "dequantise"


def before_fusion(on: bool, target: DeviceTarget) -> Any:
    if on:
        return None
    # where they start apart nothing is to do either
    return rewriting("DequantizeApart", _rewrite)


def _rewrite(mod: tvm.IRModule, func: relax.Function) -> relax.Function | None:
    made: list[Any] = []
    for binding in bindings(func):
        apart = None
        if calls(binding.value, "dequantise_matmul"):
            apart = _two_stages(mod[callee(binding.value)])
        elif calls(binding.value, "packed_matmul"):
            apart = _panels(arguments(binding.value), binding.var.ty.shape.values[-1])
        if apart is None:
            made.append(binding)
            continue
        dequantise, product, name = apart
        x, *stored = arguments(binding.value)
        out = dequantise.params[-1]
        ty = relax.TensorType([int(e) for e in out.shape], str(out.dtype))
        weight = relax.DataflowVar(f"{binding.var.name}_weight", ty)
        first = call_tir(add_function(mod, NAME, dequantise), stored, ty)
        second = call_tir(add_function(mod, name, product), [x, weight], binding.var.ty)
        made += [relax.VarBinding(weight, first), relax.VarBinding(binding.var, second)]
    return with_bindings(func, made) if len(made) > len(bindings(func)) else None


def _two_stages(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, tirx.PrimFunc, str] | None:
    """The stages of `dequantised_matmul` as a function each; the second is what plain weights of rows have."""
    root = func.body.block
    if len(root.alloc_buffers) != 1 or not isinstance(root.body, tirx.SeqStmt) or len(root.body.seq) != 2:
        return None
    (matrix,) = root.alloc_buffers
    x, *stored, y = func.params

    def alone(stage: Any, params: list[Any], pattern: int) -> tirx.PrimFunc:
        block = s_tir.SBlock([], [], [], "root", stage)
        made = tirx.PrimFunc(params, s_tir.SBlockRealize([], True, block))
        return made.with_attr("tirx.noalias", True).with_attr("op_pattern", pattern)

    spread, product = root.body.seq
    return alone(spread, [*stored, matrix], OPAQUE), alone(product, [x, matrix, y], PRODUCT), "NT_matmul"


def _panels(given: list[Any], outputs: Any) -> tuple[tirx.PrimFunc, tirx.PrimFunc, str] | None:
    """The same for weights in panels; None where they are floats already."""
    x, weight, *scales = given
    dtype = str(weight.ty.dtype)
    if not scales and dtype == str(x.ty.dtype):
        return None
    panels, _, rows = weight.ty.shape.values
    elements = x.ty.shape.values[-1]
    stored = [_placeholder(f"stored{i}", v) for i, v in enumerate((weight, *scales))]

    def element(p: Any, k: Any, r: Any) -> Any:
        if not scales:
            return stored[0][p, k, r].astype("float32")
        scale = stored[1][p, k // GROUP, r].astype("float32")
        return (nibble(stored[0][p, k // A_WORD, r], k) - float(ZERO)) * scale

    matrix = te.compute((panels, elements, rows), element, name="matrix")
    apart = te.create_prim_func([*stored, matrix]).with_attr("op_pattern", OPAQUE)
    vector = _placeholder("x", x)
    plain = te.placeholder((panels, elements, rows), "float32", name="weight")
    product = te.create_prim_func([vector, plain, packed_matmul(vector, plain, outputs)])
    return apart, product.with_attr("op_pattern", PRODUCT), "packed_matmul"


def _placeholder(name: str, var: Any) -> Any:
    """A te tensor of a variable's shape; sizes that the caller chooses get variables of their own."""
    fresh: dict[str, Any] = {}
    shape = []
    for extent in var.ty.shape.values:
        known = isinstance(extent, tirx.IntImm)
        shape.append(extent if known else fresh.setdefault(str(extent), tirx.Var(str(extent), "int64")))
    return te.placeholder(tuple(shape), str(var.ty.dtype), name=name)
