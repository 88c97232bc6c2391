"""The lowest layer of the WGSL executor: parsing, grids past WebGPU's limit, what it refuses, timestamps."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wgsl_harness
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import wgpu_device
from gpt2_tvm.runners.wgpu_device import Device
from gpt2_tvm.runners.wgsl import Shader, fold_grid, parse_wgsl


def number_blocks(blocks: int, room: int) -> PrimFunc:
    """A kernel of one thread a block: out[block] = block + 1."""

    @T.prim_func(private=True, s_tir=True)
    def number_blocks(out: T.Buffer((room,), "int32")):
        T.func_attr({"tirx.is_scheduled": True})
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                out[block] = block + 1

    return number_blocks


@pytest.mark.parametrize("blocks", [1, 65535, 65536, 70001, 131071])
def test_every_block_of_a_folded_grid_runs_once_and_no_other(blocks: int) -> None:
    """TVM's own guard lets the block after the last one run; folding 70001 blocks makes such a block."""
    (out,) = wgsl_harness.run(number_blocks(blocks, blocks + 8), [np.zeros(blocks + 8, np.int32)])
    np.testing.assert_array_equal(out[:blocks], np.arange(1, blocks + 1))
    assert not out[blocks:].any()


def test_fold_grid() -> None:
    assert fold_grid([7, 3]) == (7, 3, 1)
    assert fold_grid([65535, 65535, 1]) == (65535, 65535, 1)
    assert fold_grid([70001]) == (35001, 1, 2)
    for x in (65536, 131070, 131071, 10**6, 5 * 10**6):
        folded, _, times = fold_grid([x])
        assert folded <= 65535 and x <= folded * times < x + times
    with pytest.raises(ValueError, match="z must be 1"):
        fold_grid([1, 1, 2])
    with pytest.raises(ValueError, match="y at most"):
        fold_grid([1, 65536])


SOURCE = """// Function: scale_kernel
enable f16;
@group(0) @binding(1) var<storage, read> x_ptr : array<f16>;
@group(0) @binding(0) var<storage, read_write> out_ptr : array<f32>;
struct PODArgs {
  n: i32,
  factor: f32,
  packGridDimX: u32
}
@group(0) @binding(2) var<uniform> podArgs : PODArgs;
@compute @workgroup_size(64, 2, 1)
fn scale_kernel(@builtin(workgroup_id) blockIdx : vec3<u32>, @builtin(num_workgroups) gridDim : vec3<u32>) {
  if (blockIdx.z * gridDim.x + blockIdx.x > podArgs.packGridDimX) { return; }
  out_ptr[0] = f32(x_ptr[1]) * podArgs.factor + f32(podArgs.n);
}
"""


def test_parse_wgsl_reads_the_interface() -> None:
    shaders = parse_wgsl("// Function: scale_kernel\n//---\n" + SOURCE)
    assert list(shaders) == ["scale_kernel"]
    shader = shaders["scale_kernel"]
    assert shader.bindings == (("out_ptr", True, "f32"), ("x_ptr", False, "f16"))
    assert shader.scalars == (("n", "i32"), ("factor", "f32"))
    assert shader.block == (64, 2, 1)
    assert shader.needs_f16


def test_scalars_and_float16_buffers_of_odd_length() -> None:
    gpu = wgsl_harness.device(f16=True)
    kernel = gpu.compile(parse_wgsl(SOURCE)["scale_kernel"])
    x, out = gpu.upload(np.array([1, 2.5, 9], np.float16)), gpu.empty(4)
    gpu.submit([gpu.launch(kernel, [out, x], [-3, 2.0], [1])])
    assert gpu.read(out, (1,), np.float32) == 2.0
    assert gpu.read(x, (3,), np.float16).tolist() == [1, 2.5, 9]
    assert gpu.read(gpu.upload(np.zeros((0, 4))), (0, 4), np.float64).shape == (0, 4)
    gpu.write(x, np.array([4, 5], np.float16))
    assert gpu.read(x, (3,), np.float16).tolist() == [4, 5, 9]
    with pytest.raises(ValueError, match="2 buffers and 2 scalars"):
        gpu.launch(kernel, [out], [1, 2], [1])


def test_a_pipeline_is_made_once_for_each_source() -> None:
    gpu = wgsl_harness.device()
    shader = wgsl_shader()
    assert gpu.compile(shader) is gpu.compile(wgsl_shader())
    other = Shader(shader.name, shader.source + "\n// changed", *interface(shader))
    assert gpu.compile(other) is not gpu.compile(shader)


def wgsl_shader(source: str = SOURCE) -> Shader:
    """The shader of `source` in float32."""
    return parse_wgsl(source.replace("enable f16;\n", "").replace("f16", "f32"))["scale_kernel"]


def interface(shader: Shader) -> tuple[Any, Any, Any]:
    return shader.bindings, shader.scalars, shader.block


def test_launches_of_one_submission_run_in_order() -> None:
    gpu = wgsl_harness.device()
    kernel = gpu.compile(wgsl_shader())
    held = [gpu.upload(np.full(2, i, np.float32)) for i in range(6)]
    held[0] = gpu.upload(np.array([0, 1], np.float32))
    # each reads element 1 of the one before, which stays what it was, and writes element 0 of the next
    launches = [gpu.launch(kernel, [held[i + 1], held[i]], [i, 10.0], [1]) for i in range(5)]
    launches.append(gpu.launch(kernel, [held[0], held[5]], [0, 1.0], [0]))  # an empty grid does nothing
    gpu.submit(launches)
    gpu.wait()
    assert [gpu.read(x, (1,), np.float32)[0] for x in held] == [0, 10, 11, 22, 33, 44]


def test_times_are_positive_and_in_order_of_the_work() -> None:
    gpu = wgsl_harness.device()
    if not gpu.has_timestamps:
        pytest.skip(f"{gpu.name} has no timestamps")
    lowered = [wgsl_harness.lower_to_wgsl(number_blocks(blocks, blocks)) for blocks in (1, 10**6)]
    launches = [
        gpu.launch(gpu.compile(each.shader), [gpu.empty(4 * blocks)], [], [blocks])
        for each, blocks in zip(lowered, (1, 10**6), strict=True)
    ]
    short, long = gpu.time_us(launches, repeats=2)
    assert 0 <= short < long
    assert gpu.time_us([]) == []


def test_a_buffer_too_large_names_both_sizes() -> None:
    gpu = wgsl_harness.device()
    with pytest.raises(UserError, match=f"wte.*{gpu.max_binding_bytes + 4:,}.*{gpu.max_binding_bytes:,}"):
        gpu.empty(gpu.max_binding_bytes + 4, "wte")


def test_what_the_device_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = wgsl_harness.device()
    shader = wgsl_shader()
    wide = Shader(shader.name, shader.source, shader.bindings, shader.scalars, (4096, 1, 1))
    many = Shader(shader.name, shader.source, shader.bindings * 100, *interface(shader)[1:])
    subgroups = Shader(shader.name, "enable subgroups;\n" + shader.source, *interface(shader))
    for bad, words in ((wide, "4096 threads"), (many, "200 buffers"), (subgroups, "subgroups")):
        with pytest.raises(UserError, match=words):
            gpu.compile(bad)
    monkeypatch.setattr(gpu, "features", frozenset())
    fresh = parse_wgsl(SOURCE + "// not compiled before")["scale_kernel"]
    with pytest.raises(UserError, match=r"no float16.*q0f32"):
        gpu.compile(fresh)
    with pytest.raises(UserError, match="timestamps"):
        gpu.time_us([])


def test_source_that_the_compiler_refuses() -> None:
    gpu = wgsl_harness.device()
    with pytest.raises(RuntimeError, match="refuses kernel scale_kernel"):
        gpu.compile(wgsl_shader(SOURCE.replace("out_ptr[0] =", "out_ptr[0] = nonsense +")))


def test_without_wgpu_or_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(**_: object) -> None:
        raise RuntimeError("Request adapter failed")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wgpu", None)
        with pytest.raises(UserError, match=r"pip install 'gpt2-tvm\[webgpu\]'"):
            Device()
    fake = SimpleNamespace(gpu=SimpleNamespace(request_adapter_sync=none_here))
    monkeypatch.setitem(sys.modules, "wgpu", fake)
    with pytest.raises(UserError, match="apt install mesa-vulkan-drivers"):
        Device()


def test_the_guard_that_is_mended_is_the_one_that_tvm_writes() -> None:
    """Should TVM mend its guard, or write it differently, this says so before a wide grid goes wrong."""
    source = wgsl_harness.lower_to_wgsl(number_blocks(3, 3)).shader.source
    assert wgpu_device.GUARD.search(source)
