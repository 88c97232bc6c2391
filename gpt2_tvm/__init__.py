"""GPT-2 from a checkpoint to fast code on any device through Apache TVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "UserError", "__version__", "compile_model"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `--help` must not wait for TVM."""
    if name == "compile_model":
        from gpt2_tvm.build import compile_model

        return compile_model
    if name == "Engine":
        from gpt2_tvm.engine import Engine

        return Engine
    if name == "UserError":
        from gpt2_tvm.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
