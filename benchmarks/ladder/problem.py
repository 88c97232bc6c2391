"""One matrix product of the ladder, and the target's figures that its rungs are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """y [rows, n] = x [rows, k] times the transpose of W [n, k], and with `gelu` bias and gelu_new after it."""

    name: str
    rows: int
    k: int
    n: int
    gelu: bool
    target: Any  # targets.DeviceTarget, of kind cpu

    @property
    def flops(self) -> int:
        """Of the product alone: a multiply-add is two."""
        return 2 * self.rows * self.k * self.n

    @property
    def lanes(self) -> int:
        """Float32 in a vector register."""
        return int(self.target.limits.vector_bits or 128) // 32

    @property
    def panel_rows(self) -> int:
        """NR of steps 3 to 5: rows of W in a panel, two vector registers."""
        return 2 * self.lanes

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel_rows)

    @property
    def columns(self) -> int:
        """Columns of y as steps 0 to 5 write it: n, padded to whole panels."""
        return self.panels * self.panel_rows

    @property
    def tile_rows(self) -> int:
        """MR: rows of x whose sums fit the registers, beside two vectors of weights and one of x."""
        return int(self.target.layout.tile_rows or 6)

    @property
    def k_block(self) -> int:
        """Elements of k in a block: the panel's part of it fills at most three quarters of L1."""
        blocks = -(-self.k * 4 * self.panel_rows // (768 * (self.target.limits.l1_kib or 32)))
        return -(-self.k // blocks)

    @property
    def block_tiles(self) -> int:
        """Row tiles in a block: their packed x fills at most half of L2, their sums at most half of L1."""
        tile = 4 * self.tile_rows  # bytes of one k, or of one column
        l1, l2 = 512 * (self.target.limits.l1_kib or 32), 512 * (self.target.limits.l2_kib or 256)
        return max(1, min(l2 // (tile * self.k_block), l1 // (tile * self.panel_rows)))

    def divisor_of_k(self, most: int) -> int:
        """The largest number up to `most` that divides k."""
        return next(u for u in range(most, 0, -1) if self.k % u == 0)

    def data(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Seeded x [rows, k], weight [n, k] and bias [n], float32, with the spread of GPT-2's."""
        rng = np.random.default_rng(seed)
        return {
            "x": rng.standard_normal((self.rows, self.k), np.float32),
            "weight": rng.standard_normal((self.n, self.k), np.float32) * np.float32(0.05),
            "bias": rng.standard_normal(self.n, np.float32),
        }

    def expected(self, data: dict[str, np.ndarray], weight: np.ndarray | None = None) -> np.ndarray:
        """The result by numpy: products and sums in float32 (BLAS), everything after in float64. weight: instead of
        the data's."""
        y = (data["x"] @ (data["weight"] if weight is None else weight).T).astype(np.float64)
        if self.gelu:
            y += data["bias"]
            y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return y
