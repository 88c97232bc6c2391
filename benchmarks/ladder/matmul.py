"""Rungs 3 to 5 for many rows (prefill): W in panels [P, K, NR], NR two vector registers wide.

3 panels          a panel meets all rows while it is in L2; two multiply-adds for one broadcast element of x
4 register tile   MR rows at once: 2 MR sums in registers, each load of the panel used MR times
5 cache blocks    k in blocks, so that the panel's block stays in L1 from tile to tile; x packed, so that a tile's MR
                  elements of one k are neighbours; tiles in blocks, so that their x stays in L2 from panel to panel
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from ladder.problem import Problem


def panels(p: Problem) -> Any:
    """Rung 3."""
    return _tile(p, 1)


def register_tile(p: Problem) -> Any:
    """Rung 4: the target's MR rows."""
    return _tile(p, p.tile_rows)


def _tile(p: Problem, tile_rows: int) -> Any:
    M, N, K, L, NR, P = p.rows, p.columns, p.k, p.lanes, p.panel_rows, p.panels
    R = tile_rows

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((M, K), "float32"), w: T.Buffer((P, K, NR), "float32"), y: T.Buffer((M, N), "float32")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for panel in T.parallel(P):
            for tile in T.serial((M + R - 1) // R):
                a = T.alloc_buffer((R, L), "float32", scope="local")
                b = T.alloc_buffer((R, L), "float32", scope="local")
                for r in T.unroll(R):
                    for lane in T.vectorized(L):
                        a[r, lane] = T.float32(0)
                    for lane in T.vectorized(L):
                        b[r, lane] = T.float32(0)
                for k in T.serial(K):
                    for r in T.unroll(R):  # the last row stands in for those that the last tile lacks
                        for lane in T.vectorized(L):
                            a[r, lane] = a[r, lane] + x[T.min(tile * R + r, M - 1), k] * w[panel, k, lane]
                        for lane in T.vectorized(L):
                            b[r, lane] = b[r, lane] + x[T.min(tile * R + r, M - 1), k] * w[panel, k, L + lane]
                for r in T.unroll(R):
                    for lane in T.vectorized(L):
                        y[T.min(tile * R + r, M - 1), panel * NR + lane] = a[r, lane]
                    for lane in T.vectorized(L):
                        y[T.min(tile * R + r, M - 1), panel * NR + L + lane] = b[r, lane]

    return main


def cache_blocks(p: Problem) -> Any:
    """Rung 5: GotoBLAS's loops around the same tile."""
    M, N, K, L, NR, P = p.rows, p.columns, p.k, p.lanes, p.panel_rows, p.panels
    R, KB = p.tile_rows, p.k_block
    TILES = -(-M // R)
    BLOCKS = -(-TILES // p.block_tiles)
    BT = -(-TILES // BLOCKS)  # tiles in a block, all blocks alike

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((M, K), "float32"), w: T.Buffer((P, K, NR), "float32"), y: T.Buffer((M, N), "float32")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        packed = T.alloc_buffer((TILES, K, R), "float32")
        for tile in T.parallel(TILES):
            for r, k in T.grid(R, K):
                packed[tile, k, r] = x[T.min(tile * R + r, M - 1), k]
        for task in T.parallel(BLOCKS * P):
            sums = T.alloc_buffer((BT * R, NR), "float32")
            for block in T.serial((K + KB - 1) // KB):
                for tile in T.serial(T.min(BT, TILES - task // P * BT)):
                    a = T.alloc_buffer((R, L), "float32", scope="local")
                    b = T.alloc_buffer((R, L), "float32", scope="local")
                    for r in T.unroll(R):
                        for lane in T.vectorized(L):
                            a[r, lane] = T.if_then_else(block == 0, T.float32(0), sums[tile * R + r, lane])
                        for lane in T.vectorized(L):
                            b[r, lane] = T.if_then_else(block == 0, T.float32(0), sums[tile * R + r, L + lane])
                    for k in T.serial(T.min(KB, K - block * KB)):
                        for r in T.unroll(R):
                            for lane in T.vectorized(L):
                                a[r, lane] = (
                                    a[r, lane]
                                    + packed[task // P * BT + tile, block * KB + k, r]
                                    * w[task % P, block * KB + k, lane]
                                )
                            for lane in T.vectorized(L):
                                b[r, lane] = (
                                    b[r, lane]
                                    + packed[task // P * BT + tile, block * KB + k, r]
                                    * w[task % P, block * KB + k, L + lane]
                                )
                    for r in T.unroll(R):
                        for lane in T.vectorized(L):
                            sums[tile * R + r, lane] = a[r, lane]
                        for lane in T.vectorized(L):
                            sums[tile * R + r, L + lane] = b[r, lane]
            for row in T.serial(T.min(BT * R, M - task // P * BT * R)):
                for c in T.vectorized(NR):
                    y[task // P * BT * R + row, task % P * NR + c] = sums[row, c]

    return main
