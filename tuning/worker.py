"""`python -m tuning.worker`: offer this machine's device to sweeps that run elsewhere, through a TVM RPC tracker."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    tracker: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the tracker is.")],
    key: Annotated[str, typer.Option(help="Under which sweeps ask for this machine: --key of tuning.sweep.")],
    host: Annotated[str, typer.Option(help="The address of this machine that others can reach.")] = "127.0.0.1",
    timeout: Annotated[float, typer.Option(help="Seconds for building a point, and for running it.")] = 60.0,
    runner: Annotated[
        str | None, typer.Option(help="browser: measure webgpu in a headless Chromium instead of through wgpu.")
    ] = None,
    page_port: Annotated[
        int | None,
        typer.Option(help="With --runner browser: start none, wait for a browser of yours at this port of localhost."),
    ] = None,
) -> None:
    """Serve sweeps until stopped with Ctrl-C.

    Start a tracker first: python -m tvm.exec.rpc_tracker. Whoever reaches the tracker can run what he likes on this
    machine: keep both in a network of your own.

    \b
    Example:
      python -m tvm.exec.rpc_tracker --port 9190
      python -m tuning.worker --tracker 127.0.0.1:9190 --key webgpu
      python -m tuning.sweep --model bundled --target webgpu --tracker 127.0.0.1:9190 --key webgpu --workers 1
    """
    name, _, port = tracker.rpartition(":")
    if not name or not port.isdigit():
        raise UserError(f"--tracker {tracker}: write HOST:PORT")
    page = None
    if runner == "browser":
        from tuning.candidates.page import browser_arguments

        page = browser_arguments(page_port, lambda what: print(what, file=sys.stderr, flush=True))
    elif runner is not None:
        raise UserError(f"unknown runner {runner!r}; the only one to name is browser")
    server = serve((name, int(port)), key, host, timeout, page)
    print(f"offering this machine as {key!r} at {tracker}", file=sys.stderr, flush=True)
    try:
        while True:
            time.sleep(1)
    finally:
        server.terminate()


def serve(
    tracker: tuple[str, int],
    key: str,
    host: str = "127.0.0.1",
    timeout_s: float = 60.0,
    page: tuple[int | None, str | None] | None = None,
) -> Any:
    """TVM's RPC server, in a process of its own, with our function registered; `terminate()` ends it.

    page: of `candidates.page.browser_arguments`, to measure in a browser.
    """
    import socket

    from tvm import rpc

    try:
        socket.create_connection(tracker, 5).close()
    except OSError as error:
        raise UserError(
            f"no tracker answers at {tracker[0]}:{tracker[1]} ({error}); start one: python -m tvm.exec.rpc_tracker"
        ) from None
    return rpc.Server(
        host=host, tracker_addr=tracker, key=key, silent=True, server_init_callback=partial(register, timeout_s, page)
    )


def register(timeout_s: float, page: tuple[int | None, str | None] | None = None) -> None:
    """Called in the server's process: what `tuning.candidates.remote` asks for."""
    import tvm

    from tuning.candidates.remote import FUNCTION

    tvm.register_global_func(FUNCTION, Service(timeout_s, page).answer, override=True)


class Service:
    """Answers one sweep: requests and results as JSON. A point that hangs or crashes is an answer like others.

    Requests: {"method": "start", "target", "tasks", "budget"}, then {"method": "build" or "run", "name", "config"}.
    Answers: {"status", "value", "detail"}.
    """

    def __init__(self, timeout_s: float, page: tuple[int | None, str | None] | None = None) -> None:
        self.timeout_s, self.page = timeout_s, page
        self.child: Any = None
        self.arguments: tuple[Any, ...] = ()

    def answer(self, text: Any) -> str:
        """A request's answer."""
        from gpt2_tvm.schedules.gemv_config import GemvConfig
        from tuning.candidates.scheduling import Task
        from tuning.workloads import Workload

        request = json.loads(str(text))
        if request["method"] == "start":
            from tuning.candidates.sampling import Budget

            tasks = {
                name: Task(Workload.from_json(task["workload"]), task["function"])
                for name, task in request["tasks"].items()
            }
            self.arguments = (request["target"], tasks, Budget(**request["budget"]), *(self.page or ()))
            outcome = self._restart()
        else:
            if self.child is None or not self.child.alive:
                outcome = self._restart()
                if not outcome.ok:
                    return _json(outcome)
            config = GemvConfig.from_json(request["config"])
            extra = (request["best_us"],) if request["method"] == "run" else ()
            outcome = self.child.ask(request["method"], request["name"], config, *extra, timeout_s=self.timeout_s)
        return _json(outcome)

    def _restart(self) -> Any:
        from tuning.candidates.backends import backend_of
        from tuning.children import Child
        from tuning.sweeping import START_S

        if self.child is not None:
            self.child.kill()
        backend = backend_of(self.arguments[0], browser=self.page is not None)
        self.child = Child("point", backend, *self.arguments)
        return self.child.ready(START_S)


def _json(outcome: Any) -> str:
    return json.dumps({"status": outcome.status, "value": outcome.value, "detail": outcome.detail})


if __name__ == "__main__":
    cli.run(app)
