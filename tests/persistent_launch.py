"""Compiles a persistent step and calls it as the virtual machine does, on what `fake_cuda.c` pretends to be a GPU."""

from __future__ import annotations

import tvm

from gpt2_tvm import toolchains
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.kernels.persistent.kernel import persistent_step
from gpt2_tvm.kernels.persistent.shape import step_shape
from gpt2_tvm.quantization import get_scheme
from targets import load_target


def main() -> None:
    target = load_target("h200")
    model = GPT2Config(vocab_size=100, n_positions=64, n_embd=64, n_layer=1, n_head=1)
    shape = step_shape(model, get_scheme("q0f16"), target, 64)
    func = persistent_step(shape)
    with toolchains.compiling(target) as tvm_target:
        built = tvm.compile(tvm.IRModule({"step": func.with_attr("global_symbol", "step")}), tvm_target)
    device = tvm.cuda(0)
    given = [tvm.runtime.empty([int(n) for n in p.shape], str(p.dtype), device) for p in func.params]
    for _ in range(2):
        built["step"](*given)
    print(f"wanted grid={shape.grid},1,1 block={shape.threads},1,1 shared={shape.shared_bytes}", flush=True)


if __name__ == "__main__":
    main()
