"""A workload's function at a point of a space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.children import Failure
from tuning.workloads import Workload

if TYPE_CHECKING:
    from tvm import tirx


@dataclass(frozen=True)
class Task:
    """What travels to a child: a workload and its function before scheduling, as TVM's JSON."""

    workload: Workload
    function: str

    @staticmethod
    def of(workload: Workload, func: tirx.PrimFunc) -> Task:
        import tvm

        return Task(workload, tvm.ir.save_json(func))

    def load(self) -> tirx.PrimFunc:
        import tvm

        return tvm.ir.load_json(self.function)


def schedule(func: tirx.PrimFunc, config: GemvConfig, target: Any, name: str = "kernel") -> tirx.PrimFunc:
    """`func` at `config`, named `name`. Failure("invalid") where the point makes no schedule for it."""
    from tvm.s_tir import ScheduleError

    from gpt2_tvm.schedules.tunable_gemv import TunableGemv

    try:
        with target:
            scheduled = TunableGemv(config).apply(func, target, False)
    except (ScheduleError, ValueError) as error:
        line = next(
            (line for line in reversed(str(error).splitlines()) if line.startswith("Error message:")), str(error)
        )
        raise Failure("invalid", line.removeprefix("Error message: ").splitlines()[0]) from None
    if scheduled is None:
        raise Failure("invalid", "the rule declines the function at this point")
    (body,) = scheduled.mod.functions.values()
    return body.with_attr("global_symbol", name)


def parameters(func: tirx.PrimFunc) -> tuple[list[tuple[int, ...]], list[str]]:
    """Shapes and dtypes of all parameters."""
    return [tuple(int(e) for e in p.shape) for p in func.params], [str(p.dtype) for p in func.params]


def empty_kernel(name: str = "kernel") -> tirx.PrimFunc:
    """(float32 [1], float32 [1]): one thread stores one number. Its time is the floor under every other kernel's."""
    from tvm import te
    from tvm.s_tir import Schedule

    one = te.placeholder((1,), "float32", "one")
    sch = Schedule(te.create_prim_func([one, te.compute((1,), lambda i: one[i] + 1.0, "two")]))
    (loop,) = sch.get_loops(sch.get_sblock("two"))
    block, thread = sch.split(loop, [1, 1])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return sch.mod["main"].with_attr("global_symbol", name)
