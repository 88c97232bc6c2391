from typing import Any


def function_table(lowered: Any, plan: Any) -> dict[str, Any]:
    return {
        "compute_dtype": plan.scheme.compute_dtype,
        "functions": [{"name": h.function, "rule": h.rule} for h in lowered.hits],
    }
