"""What an engine hands to its runner: the calls of an artifact's functions, with the tensors that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call: the exported function and its inputs, tensors of the runner."""

    function: str
    inputs: Sequence[Any]


@contextmanager
def watched(engine: Any, see: Callable[[Call], Any]) -> Iterator[None]:
    """Inside the block `see` is told of each call of the engine's runner, before it runs."""
    runner = engine.runner
    original = runner.call

    def call(function: str, inputs: Sequence[Any], with_params: bool = True) -> Any:
        see(Call(function, inputs))
        return original(function, inputs, with_params)

    runner.call = call
    try:
        yield
    finally:
        del runner.call  # the class's own again
