"""Running an artifact on another machine, through TVM's RPC: the same interface as `runners.vm`, tensors over there.

Where to run is written as

    rpc://HOST:PORT/KEY          a worker with this key, from the tracker at HOST:PORT
    rpc://[KEY@]HOST:PORT        the server at HOST:PORT itself

and `?wait=SECONDS` after it says how long to wait for a worker that is free (15 s). On the other machine there must be
a worker, of the TVM that is here:

    python -m tvm.exec.rpc_server --tracker HOST:PORT --key KEY         (needs cloudpickle; the tracker also tornado)

TVM's RPC lets whoever reaches a worker run what he likes there, so both belong into a network of one's own. Library
and weights are uploaded, each file once a session, and the weights are loaded there. How many threads a CPU worker
uses is its own business (TVM_NUM_THREADS where it is started) unless `threads` says.

A call costs a round trip. Timed from here, that counts as the device's time; `RpcRunner.seconds` has TVM's evaluator
time it there instead.
"""

from __future__ import annotations

import itertools
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.base import Handle
from gpt2_tvm.runners.rpc_session import Session, open_session, parse_address

PREFIX = "rpc://"


@dataclass(frozen=True, eq=False)
class RpcTensor:
    """A tensor there. name: under which the worker's tensor cache has it; tensor: TVM's handle, which aliases it."""

    name: str
    tensor: Any


class RpcRunner:
    """See `runners.base.Runner`.

    device: an address as above. threads: of a CPU worker; None for its default. Raises UserError, in one line, where
    the address is not understood, nothing answers there, no worker is free, the worker lacks features of the CPU that
    the code needs, or its TVM does not take the library. Any call raises UserError when the worker is lost.
    """

    def __init__(self, artifact: Artifact, device: str, threads: int | None = None) -> None:
        if artifact.kind == "webgpu":
            raise UserError(
                f"{artifact.path} is for webgpu, which TVM's RPC workers on PyPI cannot run; run it where the device "
                "is, without --device"
            )
        from tvm.runtime.vm import VirtualMachine

        address = parse_address(device)
        self._artifact, self._where = artifact, str(address)
        self._session = open_session(address)
        self._device = self._session.device(artifact.kind)
        with self._calling("asking for its device"):
            _check_device(self._session, self._device, artifact)
            if threads is not None:
                self._session.function("runtime.config_threadpool")(1, threads)  # 1: big cores first, TVM's default
            self.threads = self._threads() if artifact.kind == "cpu" else None
            self.device_name = f"{device_name(self._session, self._device, artifact.kind)} at {address}"
        with self._calling("uploading"):
            library = self._session.upload(artifact.library, _digest(artifact, artifact.library.name))
        self._vm = self._load(library, VirtualMachine)
        with self._calling("loading the weights"):
            self._params = self._session.parameters(artifact, self._device)
        self._functions: dict[str, Any] = {}
        self._tuples: dict[tuple[str, ...], Any] = {}
        self._saved = itertools.count()

    def _load(self, library: str, machine: Any) -> Any:
        try:
            with self._calling("loading the library"):
                return machine(self._session.load(library), self._device)
        except UserError:
            raise
        except Exception as error:
            built = self._artifact.manifest["versions"].get("apache-tvm")
            raise UserError(
                f"the TVM of {self._where} does not take {self._artifact.library.name} ({_first_line(error)}); "
                f"it must be apache-tvm {built}, on a machine that the artifact was compiled for"
            ) from error

    def _threads(self) -> int:
        return int(self._session.function("runtime.NumThreads")())

    # runners.base.Runner ---------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: str) -> RpcTensor:
        with self._calling("allocating"):
            name, tensor = self._session.zeros(tuple(int(extent) for extent in shape), str(dtype), self._device)
        made = RpcTensor(name, tensor)
        # not at exit: the session ends there, and all its memory with it
        weakref.finalize(made, self._session.release, name).atexit = False
        return made

    def upload(self, tensor: RpcTensor, array: np.ndarray) -> None:
        with self._calling("copying to it"):
            tensor.tensor.copyfrom(np.ascontiguousarray(array))

    def download(self, tensor: Handle) -> np.ndarray:
        with self._calling("copying from it"):
            return _remote(tensor).numpy()

    def call(self, function: str, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool = True) -> Any:
        with self._calling(f"running {function}"):
            if function not in self._functions:
                self._functions[function] = self._vm[function]
            return self._functions[function](*self._arguments(inputs, with_params))

    def sync(self) -> None:
        with self._calling("waiting for it"):
            self._device.sync()

    # For the laboratory ----------------------------------------------------------------------------------------------

    def seconds(
        self, function: str, inputs: Sequence[Handle | Sequence[Handle]], number: int = 1, repeat: int = 1
    ) -> list[float]:
        """Seconds for one call, timed by the worker: `repeat` means of `number` calls in a row, after one that does not
        count.

        The worker calls with copies of the tensors among `inputs`, made once and taken up by every call, and with the
        caches of a tuple themselves: a function that moves a position (greedy) goes on from call to call, 1 +
        number * repeat steps, and the tensors here keep their values. No network is in it.
        """
        with self._calling(f"timing {function}"):
            saved = f"timed.{next(self._saved)}"
            self._vm.module["save_function"](function, saved, 0, *self._arguments(inputs, True))
            evaluator = self._vm.module.time_evaluator(saved, self._device, number=number, repeat=repeat)
            return [float(second) for second in evaluator().results]

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _arguments(self, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool) -> list[Any]:
        arguments = [self._tuple(x) if isinstance(x, list) else _remote(x) for x in inputs]
        return [*arguments, self._params] if with_params else arguments

    def _tuple(self, tensors: list[RpcTensor]) -> Any:
        names = tuple(tensor.name for tensor in tensors)
        if names not in self._tuples:
            self._tuples = {names: self._session.array(names)}  # the caches in use; older ones may go
        return self._tuples[names]

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Around whatever needs the worker: UserError once it is gone."""
        if self._session.lost:
            raise UserError(f"worker {self._where} was lost before; make a new engine to go on with another")
        try:
            yield
        except (OSError, struct.error) as error:
            raise self._gone(what) from error
        except Exception as error:
            if not _is_loss(error):
                raise
            raise self._gone(what) from error

    def _gone(self, what: str) -> UserError:
        self._session.lost = True
        needs = self._artifact.manifest["target"].get("requires") or ()
        cpu = f", or lacks one of {', '.join(needs)}" if needs and what.startswith("running") else ""
        return UserError(
            f"worker {self._where} was lost while {what}: its process or the connection ended (it may be out of "
            f"memory{cpu}); see what it printed, and run again"
        )


def _remote(handle: Handle) -> Any:
    return handle.tensor if isinstance(handle, RpcTensor) else handle


def _is_loss(error: Exception) -> bool:
    """Whether TVM says that the connection is gone; what a function over there raises comes as tvm.error.RPCError."""
    text = str(error)
    return type(error).__name__ != "RPCError" and any(
        sign in text for sign in ("SockChannel", "Socket ", "Connection reset", "Broken pipe", "channel")
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("RPCError", "Traceback", "File "))]
    return lines[0] if lines else type(error).__name__


def _digest(artifact: Artifact, name: str) -> str:
    return str(artifact.manifest["files"][name]["sha256"])


def _check_device(session: Session, device: Any, artifact: Artifact) -> None:
    """Refuse a worker without the device, or with a CPU that cannot execute the code."""
    if artifact.kind != "cpu":
        if not device.exist:
            raise UserError(f"{artifact.path} is for {artifact.kind}, and worker {session.address} has no such device")
        return
    from targets.detect import ARM_FEATURES, X86_FEATURES

    features = session.cpu_features()
    if features is None:  # a worker with TVM's runtime alone has no LLVM to ask
        return
    names = {**X86_FEATURES, **ARM_FEATURES}
    needs = artifact.manifest["target"].get("requires") or ()
    lacking = [need for need in needs if need in names and not features(names[need])]
    if lacking:
        raise UserError(
            f"{artifact.path} needs a CPU with {', '.join(lacking)}, which worker {session.address} lacks; compile it "
            "for that machine"
        )


def device_name(session: Session, device: Any, kind: str) -> str:
    """What the worker behind `session` calls its device; "a CPU" where it does not tell."""
    if kind != "cpu":
        return str(getattr(device, "device_name", kind))
    return session.cpu_name() or "a CPU"
