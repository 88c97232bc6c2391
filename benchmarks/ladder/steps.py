"""The steps of the ladder: their order, names, and the idea of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One rung. number: its place. key: its name in records. title: its name for people."""

    number: int
    key: str
    title: str


KERNEL_STEPS = tuple(
    Step(number, key, title)
    for number, (key, title) in enumerate(
        (
            ("naive", "naive loops"),
            ("vectors", "vectors"),
            ("parallel", "threads"),
            ("panels", "packed panels"),
            ("registers", "register tile"),
            ("blocks", "streams, cache blocks"),
            ("fused", "epilogue fused: what ships"),
            ("float16", "float16 weights"),
            ("int8", "int8 weights"),
        )
    )
)
FUSED, FLOAT16, INT8 = KERNEL_STEPS[6:]
SCHEMES = {FUSED.key: "q0f32", FLOAT16.key: "q16f32", INT8.key: "q8f32"}


@dataclass(frozen=True)
class ModelStep:
    """A way to compile the whole model."""

    title: str
    rules: str = "full"
    attention: str = "flash"
    quantization: str = "q0f32"


MODEL_STEPS = (
    ModelStep("no rule", rules="baseline"),
    ModelStep("TVM's own CPU rules", rules="stock"),
    ModelStep("cpu-gemv alone", rules="only-cpu-gemv"),
    ModelStep("cpu-matmul alone", rules="only-cpu-matmul"),
    ModelStep("all but cpu-reduction", rules="without-cpu-reduction"),
    ModelStep("all, attention materialized", attention="materialized"),
    ModelStep("all: what ships"),
    ModelStep("float16 weights", quantization="q16f32"),
    ModelStep("int8 weights", quantization="q8f32"),
)
