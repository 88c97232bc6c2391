"""Points on a machine behind a TVM RPC tracker.

Where the worker was started with `python -m tuning.worker`, it builds and measures by itself, each point in a child
process of its own, and only requests and results travel. A plain TVM RPC server gets the library that is compiled here,
and times it with TVM's evaluator: what crashes there takes the server with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.candidates.sampling import Budget
from tuning.candidates.scheduling import Task
from tuning.children import Failure
from tuning.sweeping import LOST

FUNCTION = "gpt2_tvm.tuning.measure"  # what our workers register with TVM
WAIT_S = 20


class RemoteCandidates:
    """See the package's docstring. `facts`: the worker's."""

    def __init__(
        self,
        announce: Callable[..., None],
        target: str,
        tasks: Mapping[str, Task],
        tracker: str,
        key: str,
        budget: Budget,
        number: int = 0,
    ) -> None:
        from gpt2_tvm.runners.rpc_session import open_session, parse_address
        from gpt2_tvm.tvm_alone import import_tvm

        import_tvm()
        announce("connect")
        self.announce = announce
        try:
            self.session = open_session(parse_address(f"rpc://{tracker}/{key}?wait={WAIT_S}"))
        except UserError as error:
            raise Failure("run-error", f"{LOST}: {error}") from None
        try:
            self.measure = self.session.function(FUNCTION)
        except AttributeError:
            from tuning.candidates.compiled import CompiledCandidates

            self.there: Any = CompiledCandidates(announce, target, tasks, budget, self.session)
            self.facts = self.there.facts
            return
        self.there = None
        self.facts = self._ask(
            "start",
            {
                "target": target,
                "budget": asdict(budget),
                "tasks": {
                    name: {"workload": task.workload.to_json(), "function": task.function}
                    for name, task in tasks.items()
                },
            },
        )

    def build(self, name: str, config: GemvConfig) -> dict[str, Any]:
        """As the backend there has it."""
        if self.there is not None:
            return self.there.build(name, config)
        return self._ask("build", {"name": name, "config": config.to_json()})

    def run(self, name: str, config: GemvConfig, best_us: float | None = None) -> dict[str, Any]:
        """As the backend there has it."""
        if self.there is not None:
            return self.there.run(name, config, best_us)
        return self._ask("run", {"name": name, "config": config.to_json(), "best_us": best_us})

    def _ask(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        self.announce(f"{method} there")
        try:
            answer = json.loads(str(self.measure(json.dumps({"method": method, **request}))))
        except Exception as error:
            raise Failure(
                "run-error", f"{LOST}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            ) from None
        if answer["status"] != "ok":
            raise Failure(answer["status"], answer["detail"])
        return answer["value"] or {}
