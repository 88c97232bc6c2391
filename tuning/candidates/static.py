"""Points without a device: many are compiled together, since the headers cost more than a kernel, and what each takes
replaces the guesses of the model that ranks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.candidates.scheduling import Task, schedule
from tuning.children import Failure


class StaticCandidates:
    """`compile(name, configs)` in a child. CUDA: registers, spills, shared memory and load widths."""

    def __init__(self, announce: Callable[..., None], target: str, tasks: Mapping[str, Task]) -> None:
        from gpt2_tvm import toolchains
        from targets import load_target, specialise

        announce("start")
        self.announce, self.tasks = announce, tasks
        self.target = specialise(load_target(target))
        toolchains.prepare(self.target)
        self.facts = {"device": f"none (compiled for {self.target.name})", "method": "static"}

    def compile(self, name: str, configs: Sequence[GemvConfig]) -> list[dict[str, Any]]:
        """For each point {"status", "detail"} where it makes no schedule, else {"status": "ok", registers,
        spill_bytes, shared_bytes, widest_load_bytes, instructions}.
        """
        import tvm

        from gpt2_tvm.host_code import split_launches
        from gpt2_tvm.toolchains import cuda

        func = self.tasks[name].load()
        answers: list[dict[str, Any]] = []
        functions = {}
        self.announce("schedule")
        device = self.target.tvm_target()
        for i, config in enumerate(configs):
            try:
                body = schedule(func, config, device, f"point{i}")
                functions[tvm.ir.GlobalVar(f"point{i}")] = body
                answers.append({"status": "ok"})
            except Failure as failure:
                answers.append({"status": failure.status, "detail": failure.detail})
        if not functions:
            return answers
        self.announce("build")
        if self.target.kind != "cuda":
            return self._shaders(functions, answers)
        arch = self.target.archs[0]
        images: list[bytes] = []
        with cuda.compiling(self.target, [arch], ptx=False) as tvm_target:
            build = tvm.get_global_func("target.build.cuda")
            original = tvm.get_global_func(cuda.CALLBACK)

            def keep(code: str, *rest: Any) -> bytes:
                images.append(bytes(original(code, *rest)))
                return images[-1]

            from gpt2_tvm.toolchains import callbacks

            with callbacks.replaced({cuda.CALLBACK: keep}):
                for device_target, kernels in split_launches(functions, tvm_target)[1].items():
                    build(kernels, device_target)
        self.announce("read the machine code")
        return self._read_sass(images, answers)

    @staticmethod
    def _read_sass(images: Sequence[bytes], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from tuning.static import sass

        for image in images:
            for kernel in sass.kernels(image):
                index = int(kernel.name.removeprefix("point").partition("_")[0])
                answer = answers[index]
                answer["registers"] = max(answer.get("registers", 0), kernel.registers)
                answer["spill_bytes"] = answer.get("spill_bytes", 0) + kernel.stack + kernel.local
                answer["shared_bytes"] = max(answer.get("shared_bytes", 0), kernel.shared)
                answer["widest_load_bytes"] = max(answer.get("widest_load_bytes", 0), kernel.widest_load or 0)
                loads = {k: v for k, v in kernel.mix.items() if k.startswith(("LDG", "LDS", "FFMA", "HFMA2", "SHFL"))}
                answer["instructions"] = loads
        return answers

    def _shaders(self, functions: dict[Any, Any], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """No machine code to read on this kind of target: that it builds is all there is to know."""
        import tvm

        from gpt2_tvm import toolchains
        from gpt2_tvm.host_code import split_launches

        with toolchains.compiling(self.target) as tvm_target:
            build = tvm.get_global_func(f"target.build.{tvm_target.kind.name}")
            for device_target, kernels in split_launches(functions, tvm_target)[1].items():
                build(kernels, device_target)
        return answers
