"""What mlc-llm calls a parameter: our own name, but for the two arrays of a matrix of four bits (mlc-llm,
python/mlc_llm/quantization/group_quantization.py)."""

from __future__ import annotations

from gpt2_tvm.quantization import SCALE, Scheme

WEIGHT = ".weight"
WORDS, SCALES = ".q_weight", ".q_scale"


def mlc_name(name: str, dtype: str, scheme: Scheme) -> str:
    """Our name of a stored array -> mlc-llm's. dtype: as stored; words are the only uint32."""
    if scheme.weight_dtype != "int4":
        return name
    if name.endswith(WEIGHT + SCALE):
        return name.removesuffix(WEIGHT + SCALE) + SCALES
    return name.removesuffix(WEIGHT) + WORDS if dtype == "uint32" else name
