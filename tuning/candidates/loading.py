"""The workload that a device holds: its inputs, one output, and more copies of its weight than a cache has room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuning.candidates.numerics import Example, dtype_of, make_example
from tuning.candidates.scheduling import Task, parameters


@dataclass(frozen=True)
class Loaded:
    """A workload on a device. func: before scheduling. inputs: x and what follows the weight. weights: equal copies, to
    be read in turn. output: what the last parameter is given."""

    func: Any
    example: Example
    inputs: list[Any]
    weights: list[Any]
    output: Any

    def calls(self) -> list[list[Any]]:
        """The arguments of one call for each copy of the weight, in the function's order."""
        x, *rest = self.inputs
        return [[x, weight, *rest, self.output] for weight in self.weights]

    def unwritten(self) -> np.ndarray:
        """NaN in the output's shape and dtype: what a kernel does not write shows."""
        return np.full(self.example.expected.shape, np.nan, dtype_of(self.example.output_dtype))


class Workloads:
    """Tasks by name, on a device through `upload`; one at a time, for copies of a large weight fill a small GPU.

    cold_bytes: of all copies of a weight together, more than the device's last cache. most: copies, at most.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        upload: Callable[[np.ndarray], Any],
        announce: Callable[..., None],
        cold_bytes: int,
        most: int,
    ) -> None:
        self._tasks, self._upload, self._announce = tasks, upload, announce
        self._cold_bytes, self._most = cold_bytes, most
        self._held: dict[str, Loaded] = {}

    def __getitem__(self, name: str) -> Loaded:
        """The workload of that name, loaded where it is not yet. Failure("invalid") as `make_example`."""
        if name not in self._held:
            self._announce("load inputs")
            task = self._tasks[name]
            func = task.load()
            shapes, dtypes = parameters(func)
            example = make_example(task.workload, shapes, dtypes)
            copies = max(1, min(self._most, -(-self._cold_bytes // task.workload.weight_bytes)))
            x, weight, *rest = example.arrays
            self._held.clear()
            self._held[name] = Loaded(
                func,
                example,
                [self._upload(a) for a in (x, *rest)],
                [self._upload(weight) for _ in range(copies)],
                self._upload(np.zeros(shapes[-1], dtype_of(dtypes[-1]))),
            )
        return self._held[name]
