"""What the engine asks of a machine: tensors on a device, and calls of an artifact's functions by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Handle = Any  # a tensor on the device, opaque to the engine


class Runner(Protocol):
    """One artifact on one device. Calls are queued; `download` and `sync` wait for them."""

    device_name: str
    threads: int | None  # of the CPU that run a parallel loop; None on another device

    def empty(self, shape: Sequence[int], dtype: str) -> Handle:
        """A zero-filled tensor."""
        ...

    def upload(self, tensor: Handle, array: np.ndarray) -> None:
        """Copy a host array into a tensor of the same shape and dtype."""
        ...

    def download(self, tensor: Handle) -> np.ndarray:
        """A host copy of a tensor, after everything queued before it."""
        ...

    def call(self, function: str, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool = True) -> Any:
        """Call an exported function; a list among the inputs is a tuple argument. Parameters are added last."""
        ...

    def sync(self) -> None:
        """Wait for everything queued."""
        ...
