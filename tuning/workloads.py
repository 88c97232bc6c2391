"""The matrix-vector products that one decoded token calls: what the GEMV tuner tunes.

Equal functions (equal IR but for names) are one workload, however many layers call them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from tvm import tirx

    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered

# Fusions that leave a product's vector outside it (passes/registry.py). With the others, LayerNorm and the merge of
# split attention are prologues of products, timed with them: points are searched for the product alone, and `compile
# --tuned` gives them to products of that shape with and without a prologue.
ALONE = "dequantize-gemv,linear-gelu,linear-residual"

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint32": 4}


@dataclass(frozen=True)
class Workload:
    """One product, as a decode step calls it.

    Attributes:
        name: readable and unique within a model: "c_fc 3072x768 float16".
        outputs, reduced: N and K of the weight.
        rows: of the activation.
        dtype: of the weight · activation_dtype, output_dtype: of x and of the result.
        roles: what it is for, in the model's words, one for each place that calls it.
        calls: times one decode step calls it.
        bytes, flops: of one call: each input read and each output written once; a multiply-add is two.
        epilogue: what follows the product, in order: "bias", an activation's name, "residual".
        digest: of its IR, without names: records of another product do not fit.
    """

    name: str
    outputs: int
    reduced: int
    rows: int
    dtype: str
    activation_dtype: str
    output_dtype: str
    roles: tuple[str, ...]
    calls: int
    bytes: int
    flops: int
    epilogue: tuple[str, ...]
    digest: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight, which a decode step reads once."""
        if self.dtype == "int4":
            return self.outputs * self.reduced // 2
        return self.outputs * self.reduced * ITEM_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "roles": list(self.roles), "epilogue": list(self.epilogue)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Workload:
        return cls(**{**values, "roles": tuple(values["roles"]), "epilogue": tuple(values["epilogue"])})


def gemv_workloads(lowered: Lowered, plan: Plan, batch: int | None = None) -> dict[Workload, tirx.PrimFunc]:
    """The products of one greedy decode step, heaviest first, each with its function before scheduling.

    batch: sequences at a time, one of the plan's; default the smallest. Raises UserError for a batch that the plan
    does not have, or where the step has no product of at most eight rows.
    """
    from tvm import s_tir

    from gpt2_tvm.inventory import function_table
    from gpt2_tvm.schedules.gemv_match import match_gemv

    size = batch or min(plan.batch_sizes)
    if size not in plan.batch_sizes:
        raise UserError(f"--batch {size}: the model is lowered for {', '.join(map(str, plan.batch_sizes))}")
    step = f"greedy_b{size}"
    functions = {var.name_hint: f for var, f in lowered.fused.functions_items()}
    table = {row["name"]: row for row in function_table(lowered, plan)["functions"]}
    groups: dict[str, tuple[Any, list[dict[str, Any]], Any]] = {}
    for name, row in table.items():
        if step not in row["calls"] or row["rule"] == "ours":
            continue
        func = functions[name]
        sch = s_tir.Schedule(func)
        match = match_gemv(sch)
        if match is None or match.outputs is None or match.reduced is None or match.rows * match.outputs < 2:
            continue
        digest = ir_digest(func)
        groups.setdefault(digest, (func, [], (match, match.weight_dtype(sch))))[1].append(row)
    found = {}
    for digest, (func, rows, (match, dtype)) in groups.items():
        roles = tuple(dict.fromkeys(role_name(row["role"]) for row in rows))
        workload = Workload(
            name=f"{' / '.join(roles)} {match.outputs}x{match.reduced} {dtype}"
            + (f" x {match.rows} rows" if match.rows > 1 else ""),
            outputs=match.outputs,
            reduced=match.reduced,
            rows=match.rows,
            dtype=dtype,
            activation_dtype=str(func.params[0].dtype),
            output_dtype=str(func.params[-1].dtype),
            roles=roles,
            calls=sum(row["calls"][step] for row in rows),
            bytes=int(rows[0]["bytes"]),
            flops=int(rows[0]["flops"]),
            epilogue=tuple(part.strip() for part in rows[0]["role"].split(" + ")[1:]),
            digest=digest,
        )
        found[workload] = func
    if not found:
        raise UserError(f"{step} of {plan.target.name} has no matrix-vector product to tune")
    return dict(sorted(found.items(), key=lambda item: -item[0].calls * item[0].bytes))


def role_name(role: str) -> str:
    """The layer's name in a role: "decode, greedy: mlp.c_fc + bias + gelu_new" -> "mlp.c_fc"."""
    return role.rpartition(": ")[2].partition(" + ")[0].strip()


def ir_digest(func: tirx.PrimFunc) -> str:
    """TVM's structural hash of a function's IR, whatever it and its variables are called, in hexadecimal."""
    import tvm_ffi

    plain = func.without_attr("global_symbol") if func.attrs and "global_symbol" in func.attrs else func
    return f"{tvm_ffi.structural_hash(plain) & (1 << 64) - 1:016x}"
