"""What this GPU can do, measured before anything is compared with it: its memory, its launches, its arithmetic.

Runs in torch, which is the neutral party here; with float32 in full precision (no TF32), as our kernels compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.results import spread

COPY_BYTES = 4 << 30  # many times any cache
NODES = 2000  # kernels in the graph that measures a node
EDGE = 8192  # of the square matrices


def require_torch(device: str) -> Any:
    """torch, with a GPU where the device is one. UserError, one line, where there is none."""
    try:
        import torch
    except ImportError:
        raise UserError("this part needs torch: pip install torch") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no NVIDIA GPU; run this part where there is one")
    return torch


def measure(
    device: str, repeats: int = 20, copy_bytes: int = COPY_BYTES, edge: int = EDGE, nodes: int = NODES
) -> dict[str, Any]:
    """Rates of `device` ("cuda", or "cpu" to try it out): median under the key, spread under `_sd`.

    copy_gb_s: a copy within device memory, bytes read plus bytes written · read_gb_s: a sum over the same · node_us: a
    kernel that does nothing, in a CUDA graph of `nodes` of them; launch_us: the same launched one by one (None on a
    CPU) · fp16_tflops, fp32_tflops: a product of square matrices of `edge`, on random numbers.
    """
    torch = require_torch(device)
    torch.backends.cuda.matmul.allow_tf32 = False

    def sync() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(run: Callable[[], Any], calls: int = 1) -> list[float]:
        for _ in range(3):
            run()
        found = []
        for _ in range(repeats):
            sync()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            sync()
            found.append((time.perf_counter() - start) / calls)
        return found

    def rate(key: str, amount: float, seconds: list[float]) -> dict[str, float]:
        rates = [amount / s for s in seconds]
        return {key: median(rates), f"{key}_sd": spread(rates)}

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": str(torch.__version__),
        "driver": _driver() if device == "cuda" else None,
        "versions": software(),
    }
    a = torch.ones(copy_bytes // 4, device=device)
    b = torch.empty_like(a)
    result |= rate("copy_gb_s", 2 * copy_bytes / 1e9, timed(lambda: b.copy_(a)))
    result |= rate("read_gb_s", copy_bytes / 1e9, timed(a.sum))
    a = b = torch.empty(0)  # give the memory back
    for key, dtype in (("fp16_tflops", torch.float16), ("fp32_tflops", torch.float32)):
        x, y = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        result |= rate(key, 2 * edge**3 / 1e12, timed(lambda x=x, y=y: x @ y))  # type: ignore[misc]
        del x, y
    return {**result, **(_launches(torch, timed, nodes) if device == "cuda" else {"node_us": None, "launch_us": None})}


def software() -> dict[str, str]:
    """Versions of what the results come from; CUDA: torch's, and of the runtime that our kernels are launched with."""
    import torch

    import gpt2_tvm
    from gpu_bench.subjects import versions

    found = {"gpt2-tvm": gpt2_tvm.__version__, **versions("apache-tvm", "apache-tvm-ffi", "torch", "triton", "numpy")}
    if torch.version.cuda:
        found["torch's CUDA"] = torch.version.cuda
    if (runtime := _cuda_runtime()) is not None:
        found["CUDA runtime"] = runtime
    return found


def _cuda_runtime() -> str | None:
    import ctypes

    from gpt2_tvm.runners.cuda_graph import _cudart

    number = ctypes.c_int()
    try:
        if _cudart().cudaRuntimeGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, RuntimeError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _launches(torch: Any, timed: Callable[..., list[float]], nodes: int) -> dict[str, float]:
    def empty() -> None:
        torch.cuda._sleep(0)  # a kernel that returns at once

    empty()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(nodes):
            empty()
    in_graph = [1e6 * s / nodes for s in timed(graph.replay)]
    alone = [1e6 * s for s in timed(empty, nodes)]
    return {
        "node_us": median(in_graph),
        "node_us_sd": spread(in_graph),
        "launch_us": median(alone),
        "launch_us_sd": spread(alone),
    }


def _driver() -> str | None:
    import subprocess

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
