"""Threads of a CPU engine: how many, and how TVM's pool behaves between its tasks.

TVM keeps one pool of workers for each thread that calls compiled code. Three of its defaults do not fit an engine that
shares a machine, and are set here:

- It takes half of the logical processors on x86, also where none of them is a hyper-thread. Ours is one thread a
  physical core that this process may use: affinity (`taskset`) and a container's CPU quota count.
- A worker without work asks for some 300,000 times before it sleeps, about 0.13 s of a core after every call. Kernels
  of one token follow one another within microseconds, so SPINS are enough; see there.
- It pins worker k to processor k, so the workers of two engines would share one core while others idle, and under
  `taskset` a worker would leave the processors it was given. Nothing is pinned: the system knows who else runs.

TVM_NUM_THREADS, TVM_THREAD_POOL_SPIN_COUNT and TVM_BIND_THREADS overrule them. With TVM_BIND_THREADS=1 each worker has
a processor of its own among those that this process may use.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError

NUM_THREADS = "TVM_NUM_THREADS"
# About 1 ms of a worker's asking, which yields the core each time: longer than anything between two kernels of a decode
# step, the read-back of its logits and the choice of the next token included. TVM's 300,000 decode no faster; without
# any, waking a thread takes as long as a small kernel, and decoding slows down by a tenth or more.
SPINS = 2000
ONE_PROCESSOR_EACH = -2  # TVM's kSpecifyOneCorePerThread

_pool = threading.local()  # .asked, .runs: what this thread's pool was last set to, and what it then ran


def default_threads() -> int:
    """TVM_NUM_THREADS where the user has set it (UserError if that is no number), else `physical_cores`."""
    given = os.environ.get(NUM_THREADS)
    if given is None:
        return physical_cores()
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise UserError(f"{NUM_THREADS}={given!r}: give a whole number from 1 up, or unset it")
    return int(given)


def check_threads(threads: int | None) -> int:
    """`threads`, or the default for None. UserError for what is no number of threads."""
    if threads is None:
        return default_threads()
    if threads < 1:
        raise UserError(f"--threads {threads}: give at least 1, or leave it out for one a physical core")
    return int(threads)


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use, at least 1: within its affinity, and no more than its CPU quota.

    A second hyper-thread adds nothing to loops that keep its core's units busy. `root`: where /proc and /sys are.
    """
    if hasattr(os, "sched_getaffinity"):
        processors = os.sched_getaffinity(0)
        cores = len({_core_of(processor, root) for processor in processors})
    else:
        cores = _counted_by_psutil() or os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _core_of(processor: int, root: Path) -> str:
    """A text that the hyper-threads of one core share."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:  # a system that does not say has no hyper-threads that we know of
        return f"processor {processor}"


def _counted_by_psutil() -> int | None:
    try:
        import psutil
    except ImportError:  # a packed bundle brings numpy alone
        return None
    return psutil.cpu_count(logical=False)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that this process's control groups allow it (`docker run --cpus`); None: no limit."""
    quotas = [q for q in map(_quota_of, _control_groups(root)) if q is not None]
    return min(quotas, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's groups and all above them, of both versions (Linux, cgroups(7))."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / "sys/fs/cgroup"]
        if controllers:
            mounts = [root / "sys/fs/cgroup" / name for name in ("cpu", controllers)]
        for mount in mounts:
            group = mount / path.lstrip("/")
            # a container may see its own group as the mount's root, under a path that is the host's
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _quota_of(group: Path) -> float | None:
    """Quota over period: `cpu.max` of version 2, `cpu.cfs_*_us` of version 1."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota.strip() != "max" and int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def prepare_pools() -> None:
    """Before this process's first pool starts: how its workers wait, and that they are not pinned."""
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPINS))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def use_threads(threads: int) -> int:
    """Have the calling thread's pool run `threads` threads, itself included -> how many it runs.

    A pool shrinks and grows back, but not past the number that it was made with: the larger of the default and of what
    its first user asked for; fewer only where TVM made it before us. Costs nothing where it is set so already.
    """
    if getattr(_pool, "asked", None) == threads:
        return int(_pool.runs)
    import tvm_ffi

    if not hasattr(_pool, "asked"):
        _configure(max(threads, default_threads()))
    _configure(threads)
    _pool.asked, _pool.runs = threads, int(tvm_ffi.get_global_func("runtime.NumThreads")())
    return int(_pool.runs)


def _configure(threads: int) -> None:
    import tvm_ffi

    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(threads)
    # the list's length is the pool's size; with more threads than processors they take turns on them
    own = [str(processors[i % len(processors)]) for i in range(threads)]
    configure: Any = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(ONE_PROCESSOR_EACH, threads, own)
