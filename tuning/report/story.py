"""What a rule or a kernel says about itself: where nothing was scheduled with primitives, the author's own account of
its stages stands in the page."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Story:
    """file: from the package on, such as gpt2_tvm/schedules/cpu_gemv.py. text: its docstring."""

    file: str
    text: str


def of_rule(rule: Any) -> Story:
    """The docstring of the module that a rule was written in, or of its class where the module has none."""
    rule = getattr(rule, "rule", rule)  # what a wrapper of ours wraps
    module = sys.modules[type(rule).__module__]
    return Story(module.__name__.replace(".", "/") + ".py", inspect.getdoc(module) or inspect.getdoc(type(rule)) or "")


def of_kernel(function: str, kind: str) -> Story | None:
    """The docstring of the file in gpt2_tvm/kernels that a handwritten function of this name comes from; None where no
    file names it. kind: the target's, because a CPU's kernels are other files."""
    import gpt2_tvm.kernels as kernels

    prefix = "cpu_" if kind == "cpu" else "gpu_"
    here = sorted(Path(kernels.__path__[0]).glob("*.py"))
    other = "gpu_" if kind == "cpu" else "cpu_"
    files = [
        *(p for p in here if p.name.startswith(prefix)),
        *(p for p in here if not p.name.startswith((prefix, other))),
    ]
    base = re.sub(r"\d+$", "", function)
    base = {"most_likely": "argmax"}.get(base, base)  # named for what it is for
    names = [base, re.sub(r"_(append|combine)$", "", base)]
    names += [name.replace("tree_", "decode_") for name in names]  # a GPU's tree attention is decode's, with a mask
    for name in dict.fromkeys(names):
        for path in files:
            text = path.read_text(encoding="utf-8")
            if re.search(rf"\b(def |\"){name}_?\b", text):
                module = inspect.cleandoc(text.split('"""')[1]) if text.startswith('"""') else ""
                return Story(f"gpt2_tvm/kernels/{path.name}", module)
    return None
