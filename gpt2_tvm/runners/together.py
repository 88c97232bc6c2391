"""Calls of one or several artifacts on a device as one submission: the host says "go" once, and reads back when it
likes. On WebGPU that is one command buffer, on CUDA one graph, elsewhere the calls one after another."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_tvm.runners.base import Handle, Runner


@dataclass(frozen=True, eq=False)
class Call:
    """A call of `runner`, as `Runner.call` takes it. The same object may stand several times in a submission."""

    runner: Runner
    function: str
    inputs: Sequence[Handle | Sequence[Handle]]


def share_device(a: Runner, b: Runner) -> bool:
    """Whether tensors of one can be inputs of the other's calls."""
    ours, theirs = (getattr(runner, "device", None) for runner in (a, b))
    if type(a) is not type(b) or ours is None:
        return False
    return ours is theirs or (hasattr(ours, "dlpack_device_type") and ours == theirs)


class Together:
    """`calls` in order, again and again with the same tensors; each call of this object is one submission.

    Attributes:
        submissions: how often something was handed to the device as a whole (0 where there is no such thing).

    All runners must share a device. The calls' tensors are held, and must be the ones still in use.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self.submissions = 0
        self._launches: list[Any] | None = None
        self._result: Any = None
        self._graph: Any = None
        self._driver: Any = None
        self._ran = False

    def __call__(self) -> Any:
        """Run -> what the last call returns, to be downloaded before the next run."""
        runner: Any = self.calls[-1].runner
        if hasattr(runner, "bound"):
            return self._submit(runner)
        if self._graph is not None:
            self._driver.launch(self._graph)
            self.submissions += 1
            return self._result
        graphs = getattr(runner, "graphs", None)
        # the first run loads what the kernels need, so that the second can be captured
        if self._ran and graphs is not None and graphs.enabled and not graphs.refused and self._graphed():
            self._capture(graphs)
            if self._graph is not None:
                return self()
        for call in self.calls:
            result = call.runner.call(call.function, call.inputs)
        self._ran = True
        return result

    # WebGPU ----------------------------------------------------------------------------------------------------------

    def _submit(self, runner: Any) -> Any:
        if self._launches is None:
            bound = {id(call): call.runner.bound(call.function, call.inputs) for call in self.calls}  # type: ignore[attr-defined]
            self._launches = [launch for call in self.calls for launch in bound[id(call)].launches]
            self._result = bound[id(self.calls[-1])].outputs
        runner.device.submit(self._launches)
        self.submissions += 1
        return self._result

    # CUDA ------------------------------------------------------------------------------------------------------------

    def _graphed(self) -> bool:
        runners: list[Any] = [call.runner for call in self.calls]
        return all(getattr(r, "graphs", None) is not None and r.graphs.enabled for r in runners) and all(
            r.has_graph(call.function) for r, call in zip(runners, self.calls, strict=True)
        )

    def _capture(self, graphs: Any) -> None:
        """All calls into one graph; where CUDA refuses, they go on one by one."""
        results: list[Any] = []

        def run() -> None:
            results[:] = [call.runner.replayed(call.function, call.inputs) for call in self.calls]  # type: ignore[attr-defined]

        try:
            self._graph = graphs.driver.capture(run)
        except Exception as error:
            graphs.refuse(error)
            return
        self._driver, self._result = graphs.driver, results[-1]
        weakref.finalize(self, graphs.driver.destroy, self._graph).atexit = False
