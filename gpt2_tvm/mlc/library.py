"""A folder in MLC's layout with a library for this machine, whoever made it, ready for `PagedEngine`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.chat_config import CHAT_CONFIG
from gpt2_tvm.mlc.engine import PAGE, PagedEngine

SUFFIXES = (".so", ".dylib", ".dll")


@dataclass(frozen=True)
class Library:
    """What `open_library` found.

    vm, device: TVM's. parameters: the tuple that the functions take. metadata: what `_metadata` answers. threads: of a
    CPU's pool, else None.
    """

    vm: Any
    device: Any
    device_name: str
    parameters: Any
    metadata: dict[str, Any]
    threads: int | None

    def engine(self, batch: int, tokens: int) -> PagedEngine:
        """An engine whose cache has pages for `batch` sequences of so many tokens. UserError where the library was
        compiled for a shorter context or fewer sequences."""
        for asked, key in ((tokens, "context_window_size"), (batch, "max_batch_size")):
            if asked > int(self.metadata[key]):
                raise UserError(f"{batch} sequences of {tokens} tokens: the library has {key} {self.metadata[key]}")
        pages = batch * -(-tokens // PAGE)
        return PagedEngine(self.vm, self.device, self.parameters, self.metadata, pages * PAGE, self.threads)


def open_library(folder: str | Path, kind: str, device: str | None = None, threads: int | None = None) -> Library:
    """Load the one library in a folder with configuration and tensor cache.

    kind: TVM's name of the device that it was compiled for. device, threads: as for `Engine`. Raises UserError for a
    folder that lacks something, weights that are damaged or not the library's, and where there is no such device.
    """
    import tvm
    from tvm.runtime.vm import VirtualMachine

    from gpt2_tvm.mlc.tensors import read_tensors
    from gpt2_tvm.runners.vm import device_name, set_up_pool, tvm_device

    source = Path(folder)
    found = [file for file in sorted(source.glob("*")) if file.suffix in SUFFIXES]
    if len(found) != 1 or not (source / CHAT_CONFIG).is_file():
        raise UserError(f"{source} is no model of MLC's for this machine: it has {len(found)} libraries; compile again")
    where = tvm_device(kind, device, source)
    pool = set_up_pool(threads) if kind == "cpu" else None
    try:
        vm = VirtualMachine(tvm.runtime.load_module(str(found[0])), where)
        metadata = json.loads(str(vm["_metadata"]()))
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{found[0]} does not load here ({said}); compile it again with the TVM of this machine"
        ) from None
    chat = json.loads((source / CHAT_CONFIG).read_text(encoding="utf-8"))
    metadata.setdefault("active_vocab_size", chat.get("vocab_size"))
    tensors: dict[str, Any] = {}
    for name, array in read_tensors(source):
        tensors[name] = tvm.runtime.tensor(np.ascontiguousarray(array), where)
    for one in metadata["params"]:
        tensor = tensors.get(one["name"])
        if tensor is None or list(tensor.shape) != one["shape"] or str(tensor.dtype) != one["dtype"]:
            raise UserError(f"{source} has no {one['name']} as {found[0].name} wants it; convert the weights again")
    parameters = tvm.runtime.convert([tensors[one["name"]] for one in metadata["params"]])
    return Library(vm, where, device_name(where, kind), parameters, metadata, pool)
