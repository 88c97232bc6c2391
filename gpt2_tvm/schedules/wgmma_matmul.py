"""`wgmma-matmul`: prefill's products by Hopper's warpgroup instructions (sm_90a), for prompts and batches of many rows.

The operands of `mma.sync` pass through registers, a warp at a time, which is not enough to keep Hopper's tensor cores
busy. `wgmma` takes both matrices from shared memory, for 64 rows and up to 256 columns an instruction, and works on
while its warps do other things. A block has two warpgroups with 64 rows each, which share their columns of W:

    for step of k, 64 elements:
        wait for this step's stage; fence: what cp.async wrote, for the tensor cores; barrier
        4 times: acc += wgmma.m64nNk16 (x's stage, W's stage)      # asynchronous
        stage of step + s - 2 <- x, W                              # while the tensor cores work
        wait for the instructions of the step before

So the tensor cores always have a step in hand while threads wait at the barrier: a stage is filled again only when the
barrier has told that both warpgroups are through with the step that was there, one step late.

In shared memory lines of 64 elements, 128 bytes, lie one after the other. Of the 8 pieces of 16 bytes in line r piece p
is in place p ^ (r % 8): the 128-byte swizzle, by which 8 lines are read without bank conflicts and without padding. The
instruction undoes it from bits of the address, so stages start at multiples of 1,024 bytes.

These blocks are `tensor-matmul`'s fourth kernel, for more rows than its 128 x 128 are for. Copies are by
cp.async, 16 bytes a thread. The copy engine (TMA) would spare the threads their addresses, which here are off the
tensor cores' path; it would need its descriptors encoded by the host for each call's x.

Layouts: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Instructions", figures of matrix fragments for
wgmma.m64nNk16, "Matrix Descriptor Format", "Shared Memory Matrix Layout" (K-major, 128-byte swizzling).
"""

from __future__ import annotations

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target

from gpt2_tvm.kernels.cuda_prefill_attention import CHUNK
from gpt2_tvm.kernels.math import Expr
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.schedules.registry import LETTERS
from gpt2_tvm.schedules.stages import Buffer, bind
from gpt2_tvm.schedules.tensor_matmul import TensorKernel, TensorMatmul
from gpt2_tvm.schedules.tensor_tiles import GROUP, TensorTile
from gpt2_tvm.schedules.webgpu_product import Product, loop, where

RULE = "wgmma-matmul"
ARCH = LETTERS[RULE]  # and only that: no other architecture has the instructions
DEPTH = 64  # elements of k a step: a line is then 128 bytes, what the swizzle is for
LINE_BYTES, LINES = 128, 8  # of a swizzled piece of shared memory
K = 16  # of an instruction
WARPGROUP = 128  # threads
ROWS = 128  # of a block: 64 for each of two warpgroups
COLUMNS = (256, 192, 160, 128)
MOST_SHARED_BYTES = 227 << 10  # a block's on sm_90 (CUDA C++ Programming Guide 13.0, "Compute Capabilities")
RESERVED_BYTES = 1 << 10  # of each block, beside its own; a multiprocessor has 228 KiB
# A descriptor's fields from its 14th bit: lines of 8 rows are 1,024 bytes apart (bits 32 .. 45, in units of 16 bytes);
# 128-byte swizzle (1 in bits 62 .. 63). The leading offset (bits 16 .. 29) is not used by swizzled K-major layouts.
DESCRIPTOR = (LINES * LINE_BYTES // 16) << 32 | 1 << 62 | 1 << 16


def settled(count: int) -> tuple[str, str]:
    """(name, source) of a CUDA function that keeps the compiler from moving uses of `count` sums across it.

    The sums change until `wgmma.wait_group`, but for a C++ compiler they are results of the instructions before it.
    TVM's own `wgmma.noop_barrier` (0.27) works on a copy.
    """
    name = f"gpt2_tvm_settled_{count}"
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return (
        name,
        f"""
// gpt2_tvm: no use of the sums passes this
__forceinline__ __device__ void {name}(float *sums) {{
  asm volatile("" : {sums} :: "memory");
}}
""",
    )


class WgmmaTile(TensorTile):
    """A block's part: `rows` a multiple of 64, a warpgroup for each; all columns in one instruction."""

    @property
    def stride(self) -> int:
        return self.depth


def wgmma_tile(columns: int, k: int, most_bytes: int = MOST_SHARED_BYTES) -> WgmmaTile | None:
    """The tile for many rows: the widest that divides the columns, else 128. None where k does not fit.

    Four stages; three where two blocks then share a multiprocessor's memory.
    """
    if k % DEPTH:
        return None
    wide = next((c for c in COLUMNS if columns % c == 0), COLUMNS[-1])
    for stages in (4, 3):
        tile = WgmmaTile(ROWS, wide, 8, 1, DEPTH, stages, GROUP)
        if 2 * (tile.shared_bytes + RESERVED_BYTES) <= most_bytes + RESERVED_BYTES:
            return tile
    return WgmmaTile(ROWS, wide, 8, 1, DEPTH, 4, GROUP)


class WgmmaMatmul(TensorMatmul):
    """`TensorMatmul`, with warpgroup instructions where rows are many. Takes functions for sm_90a alone."""

    def is_for(self, target: Target, limits: GpuLimits) -> bool:
        return str(target.attrs.get("arch", "")) == ARCH

    def is_for_rows(self, rows: int | None) -> bool:
        return rows is None  # few ones are another rule's, which this one may stand before

    def larger(self, m: Product, x: Buffer, w: Buffer, limits: GpuLimits) -> list[TensorKernel] | None:
        tile = wgmma_tile(int(m.column.extent), int(m.k.extent))
        return None if tile is None else [*(super().larger(m, x, w, limits) or ()), WgmmaKernel(m, x, w, tile)]


class WgmmaKernel(TensorKernel):
    """Writes the loops of one kernel; see the module."""

    def allocate(self) -> None:
        shape = [self.t.stages * self.t.stage]
        stages = T.sblock_alloc_buffer(shape, "float16", scope="shared.dyn", align=LINES * LINE_BYTES)
        self.shared = IRBuilder.name("stages", stages)

    def place(self, line: Expr, piece: Expr) -> Expr:
        return line * self.t.stride + (piece ^ line % LINES) * CHUNK

    def multiply(self) -> None:
        t, count = self.t, self.k // self.t.depth
        width = f"m64n{t.columns}k{K}"
        self.product = T.ptx[f"wgmma.mma_async.sync.aligned.{width}.f32.f16.f16"]
        for step in range(t.stages - 2):
            self.fetch(tirx.const(step, "int32"), tirx.const(step * t.stage, "int32"), needed=step < count)
        # where x and W of stage 0 are, in the units of a descriptor
        self._settle()
        start = T.cuda.cvta_generic_to_shared(self.shared.access_ptr("r"))
        start = bind("start", tirx.Cast("int32", start & tirx.const(0x3FFFF, "uint32")) >> 4)
        own = bind("own", start + self.tid // WARPGROUP * (ROWS // 2 * LINE_BYTES // 16))
        with loop("step", count) as step:
            T.evaluate(T.ptx["cp.async.wait_group"](t.stages - 3))
            T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())
            T.evaluate(T.tvm_storage_sync("shared"))
            at = bind("at", step % t.stages * (2 * t.stage // 16))
            T.evaluate(T.ptx["wgmma.fence.sync.aligned"]())
            for k in range(0, t.depth, K):
                self._instruction(own + at + k // CHUNK, start + at + (t.rows * t.stride + k) // CHUNK)
            T.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())
            ahead = step + (t.stages - 2)
            with where(ahead < count, True):
                self.copies(ahead, ahead % t.stages * t.stage)
            T.evaluate(T.ptx["cp.async.commit_group"]())
            T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](1))
        T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](0))
        self._settle()

    def _settle(self) -> None:
        name, source = settled(self.t.columns // 2)
        first = tirx.address_of(tirx.BufferLoad(self.acc, [0]))
        T.evaluate(cuda_func_call(name, first, source_code=source))

    def _instruction(self, x: Expr, w: Expr) -> None:
        def descriptor(place: Expr) -> Expr:
            return tirx.Cast("uint64", tirx.Cast("uint32", place)) | tirx.const(DESCRIPTOR, "uint64")

        sums = [tirx.BufferLoad(self.acc, [i]) for i in range(self.t.columns // 2)]
        plain = (True, 1, 1, 0, 0)  # onto what is there; neither factor negated nor transposed
        T.evaluate(self.product(*sums, descriptor(x), descriptor(w), *plain))
