"""The two kernels that the toolchains' tests build for every kind of target."""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm import te, tirx

from gpt2_tvm import toolchains
from gpt2_tvm.toolchains import cuda
from targets import DeviceTarget

N, K = 256, 512


def kernels(dtype: str = "float16") -> tvm.IRModule:
    """`gemv`: [1, K] x [N, K] -> [1, N]; `matmul`: [m, K] x [N, K] -> [m, N] for any m."""

    def matmul(name: str, rows: int | tirx.Var) -> tirx.PrimFunc:
        x, w = te.placeholder((rows, K), dtype, "x"), te.placeholder((N, K), dtype, "w")
        k = te.reduce_axis((0, K), "k")
        out = te.compute((rows, N), lambda i, j: te.sum(x[i, k] * w[j, k], axis=k), "NT_matmul")
        return te.create_prim_func([x, w, out]).with_attr("global_symbol", name)

    return tvm.IRModule({"gemv": matmul("gemv", 1), "matmul": matmul("matmul", tirx.Var("m", "int32"))})


def build(target: DeviceTarget, folder: Path, dtype: str = "float16", **options: object) -> tuple[object, list[str]]:
    """(executable, names of files in `folder`) of `kernels`, scheduled by stock DLight on GPUs."""
    from tvm.s_tir import dlight

    context = cuda.compiling(target, **options) if options else toolchains.compiling(target)
    with context as tvm_target:
        module = kernels(dtype)
        if target.kind != "cpu":
            rules = (dlight.gpu.Matmul(), dlight.gpu.GEMV(), dlight.gpu.Fallback())
            module = dlight.ApplyDefaultSchedule(*rules)(module)
        executable = tvm.compile(module, tvm_target)
    folder.mkdir(exist_ok=True)
    return executable, toolchains.export(executable, target, folder)
