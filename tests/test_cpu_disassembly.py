"""What artifacts for x86-64 (AVX-512, AVX2) and arm64 consist of: taken apart here, whatever machine this is."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("capstone", reason="needs pip install capstone pyelftools")

from checkers import cpu_code

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.build import compile_model
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.weights import write_hf_checkpoint

TARGETS = {"x86-64-v4": 512, "x86-64-v3": 256, "arm64": 128}  # name to the bits of its vectors
HEAVY = ("matmul", "attention")  # in the names of the kernels that do nearly all of the work
# What a kernel may call: TVM's runtime. Of libm only logf, once a row of `score`.
LIBM_ALLOWED = {"logf"}
LIBM = ("exp", "log", "tanh", "erf", "pow", "sqrt", "sin", "cos", "fma", "floor", "round")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with GPT-2's head size: the code of more is the same."""
    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=256, n_layer=1, n_head=4)
    return write_hf_checkpoint(tmp_path_factory.mktemp("checkpoint") / "one", config, random_model(config, seed=1))


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The library of each target, filled in as tests ask for it by `library`."""
    return {"checkpoint": checkpoint, "folder": tmp_path_factory.mktemp("artifacts")}


def library(compiled: dict[str, Path], target: str, quantization: str = "q0f32") -> Path:
    name = f"{target}-{quantization}"
    if name not in compiled:
        output = compiled["folder"] / name
        widths = (4,) if quantization == "q0f32" else ()
        compile_model(str(compiled["checkpoint"]), target, quantization, output=output, verify_widths=widths)
        compiled[name] = open_artifact(output).library
    return compiled[name]


def check_products(kernels: dict[str, cpu_code.Kernel], bits: int, least: int) -> None:
    """Every matrix product and attention multiplies whole vectors, with its sums in registers and no call."""
    heavy = {name: kernel for name, kernel in kernels.items() if any(word in name for word in HEAVY)}
    assert len(heavy) > 10 and any("attention" in name for name in heavy)
    for name, kernel in heavy.items():
        products = kernel.products(bits)
        assert products, f"{name}: no inner loop of {bits}-bit multiply-adds"
        assert max(loop.multiply_adds(bits) for loop in products) >= least, name
        for loop in products:
            text = "\n".join(loop.code)
            assert loop.stack_accesses == 0, f"{name} spills in an inner loop:\n{text}"
            assert loop.calls == 0, f"{name} calls from an inner loop:\n{text}"
            assert loop.count(cpu_code.SCALAR_MULTIPLY_ADD[loop.machine]) == 0, f"{name}:\n{text}"


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_vector_multiply_adds_in_registers(compiled: dict[str, Path], target: str) -> None:
    path = library(compiled, target)
    check_products(cpu_code.kernels(path), TARGETS[target], least=8)
    called = {name for name in cpu_code.imports(path) if name.removesuffix("f") in LIBM or name in LIBM}
    assert called <= LIBM_ALLOWED


@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_float16_weights_are_widened_a_vector_at_a_time(compiled: dict[str, Path], target: str) -> None:
    kernels = cpu_code.kernels(library(compiled, target, "q0f16"))
    check_products(kernels, TARGETS[target], least=8)
    for name, kernel in kernels.items():
        if "matmul" in name:
            assert kernel.count(cpu_code.WIDEN[kernel.machine]), name


def test_many_rows_of_attention_use_what_registers_there_are(compiled: dict[str, Path]) -> None:
    """Prefill's scores and mixing: at least two inner loops with 16 multiply-adds of AVX-512's 512 bits."""
    loops = cpu_code.kernels(library(compiled, "x86-64-v4"))["chain_attention"].products(512)
    assert sum(loop.multiply_adds(512) >= 16 for loop in loops) >= 2


def test_a_loop_that_spills_is_seen() -> None:
    """The checker itself: a loop with a stack access and a call, and one without, in both instruction sets."""
    x86 = [
        (0x10, "vmovups zmm0, zmmword ptr [rsp + 0x40]"),
        (0x18, "vfmadd231ps zmm1, zmm0, dword ptr [rax]{1to16}"),
        (0x20, "call 0x100"),
        (0x25, "jne 0x10"),
        (0x27, "vfmadd231ps zmm1, zmm0, zmm2"),
        (0x2D, "vfmadd231ss xmm1, xmm0, xmm2"),
        (0x33, "jb 0x27"),
        (0x35, "jmp 0x10"),  # the outer loop
        (0x37, "jmp 0x40"),
        (0x39, "mov rax, qword ptr [rsp]"),  # out of the way: jumped to from elsewhere, and back into the loop
        (0x3D, "jmp 0x27"),
        (0x40, "ret "),
    ]
    first, second = cpu_code.Kernel("k", "x64", tuple(x86)).loops()
    assert (first.multiply_adds(512), first.stack_accesses, first.calls) == (1, 1, 1)
    assert (second.multiply_adds(512), second.stack_accesses, second.calls) == (1, 0, 0)
    assert second.count(cpu_code.SCALAR_MULTIPLY_ADD["x64"]) == 1
    arm = [
        (0x10, "ldr q0, [sp, #0x20]"),
        (0x14, "fmla v1.4s, v0.4s, v2.s[1]"),
        (0x18, "bl #0x100"),
        (0x1C, "b.ne #0x10"),
        (0x20, "fmla v1.4s, v0.4s, v2.4s"),
        (0x24, "cbnz x3, #0x20"),
    ]
    first, second = cpu_code.Kernel("k", "AArch64", tuple(arm)).loops()
    assert (first.multiply_adds(128), first.stack_accesses, first.calls) == (1, 1, 1)
    assert (second.multiply_adds(128), second.stack_accesses, second.calls) == (1, 0, 0)
