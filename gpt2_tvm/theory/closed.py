"""The closed forms: FLOPs and bytes of embedding, MHA, MLP and head as polynomials in b, n, p and s.

Operations are counted as `gpt2_tvm.work` counts them in the compiled functions: add, subtract, multiply, divide and
maximum are 1, so a multiply-add is 2; a call of exp, tanh … is 1; casts and selects are free. Bytes are what kernels
read and write when each operand passes through memory once a kernel: fused are a matrix product with its bias,
activation and residual, and nothing else.

For a forward pass of N tokens without a cache (p = 0, s = N) these take the form

    FLOPs = C1 BN + C2 BN^2        bytes = C3 + C4 BN + C5 BN^2 + C6 N^2

with C1 and C3 of the weights, C4 of activations, C2 and C5 of the scores and C6 of a mask in memory, plus a few
bytes a sequence (positions and lengths).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.theory.dtypes import SCALED, TABLES, Dtypes
from gpt2_tvm.theory.form import B, Form, N, Number, P, S, rows_of_table

PARTS = ("embedding", "MHA", "MLP", "head")
# textbook: queries, keys and values as they come, N^2 scores in memory, a mask in memory. flash, materialized: ours.
ATTENTION = ("textbook", "flash", "materialized")
INT = 4  # bytes of an id, a position or a length
MASK = 1  # bytes of an element of the textbook's mask

# Operations of an activation, an element: with the target's own tanh, erf and sigmoid, each 1; and (CPU) with ours from
# kernels/math.py, where exp is 21 (range reduction 7, polynomial 8, its use 4, scaling 2), tanh 40, erf 63, sigmoid
# exp + 3.
#   gelu_new: 0.5 x, 1 + tanh(u), their product; u = c (x + d x x x) is 5    ours: x sigmoid(2 u)
#   gelu: 0.5 x, x / sqrt 2, 1 + erf, their product                         silu: x sigmoid(x)
ACTIVATION_FLOPS = {
    "gelu_new": (9, 31),
    "gelu": (5, 67),
    "silu": (2, 25),
    "tanh": (1, 40),
    "relu": (0, 0),
}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes."""

    flops: Form
    bytes: Form

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: Number) -> Work:
        return Work(self.flops * times, self.bytes * times)


def total(works: dict[str, Work]) -> Work:
    """The sum of all parts."""
    return sum(works.values(), Work(Form(), Form()))


@dataclass(frozen=True)
class Model:
    """What the closed forms are of.

    Attributes:
        config, dtypes: the model, and bytes an element.
        attention: one of `ATTENTION`.
        cached: whether keys and values go to a cache and are read there; our kernels always do so, the textbook's
            naive forward pass does not.
        last_row: logits of the last row of each sequence alone, as prefill makes them; else of every row.
        fast_math: activations in arithmetic of ours (CPUs), not by the target's intrinsics.
        float_tables: those of `dtypes.TABLES` that are not quantised with the other weights. A tied model has one
            table for both, which either keeps.
    """

    config: GPT2Config
    dtypes: Dtypes
    attention: str = "flash"
    cached: bool = True
    last_row: bool = False
    fast_math: bool = False
    float_tables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.float_tables) - set(TABLES):
            raise UserError(f"no table is called {', '.join(sorted(unknown))}; those are {' and '.join(TABLES)}")
        if self.config.pruned:
            raise UserError("the closed forms are of whole models; python -m gpt2_tvm.compare predicts pruned ones")

    def parts(self) -> dict[str, Work]:
        """Each of `PARTS`; MHA and MLP of all layers together."""
        layers = self.config.n_layer
        return {
            "embedding": self.embedding(),
            "MHA": self.mha() * layers,
            "MLP": self.mlp() * layers,
            "head": self.head(),
        }

    # Parts -----------------------------------------------------------------------------------------------------------

    def embedding(self) -> Work:
        """The token's row plus the position's; a table is read once at the most."""
        c, a, dtypes = self.config, self._a, self.of_table("embedding")
        tables = rows_of_table(dtypes.matrix_bytes(c.vocab_size, c.n_embd), dtypes.row_bytes(c.n_embd))
        tables = tables + rows_of_table(a * c.n_positions * c.n_embd, a * c.n_embd)
        dequantise = int(dtypes.weights in SCALED)
        return Work((1 + dequantise) * c.n_embd * (B * N), tables + (INT + a * c.n_embd) * (B * N) + INT * B)

    def mha(self) -> Work:
        """One layer: LayerNorm, queries, keys and values, attention, projection and residual."""
        E = self.config.n_embd
        attend = {"textbook": self._textbook, "flash": self._flash, "materialized": self._materialized}
        ends = self.norm() + self.linear(E, 3 * E) + self.linear(E, E, residual=True)
        return ends + self._append() + attend[self.attention]()

    def mlp(self) -> Work:
        """One layer: LayerNorm, up, activation, down and residual."""
        E, inner = self.config.n_embd, self.config.n_inner
        return self.norm() + self.linear(E, inner, self.activation_flops()) + self.linear(inner, E, residual=True)

    def head(self) -> Work:
        """The last LayerNorm and the product with the token table (or the head's own)."""
        E, V = self.config.n_embd, self.config.vocab_size
        rows, dtypes = B if self.last_row else B * N, self.of_table("head")
        product = Work(
            (2 * E + dtypes.scales_an_output(E)) * V * rows,
            (self._a * E + self._f * V) * rows + dtypes.matrix_bytes(V, E),
        )
        taken = Work(Form(), (2 * self._a * E + INT) * B) if self.last_row else Work(Form(), Form())
        return taken + self.norm(rows) + product

    # Pieces ----------------------------------------------------------------------------------------------------------

    def norm(self, rows: Form | None = None) -> Work:
        """Mean (E adds, 1 division), variance (4 E), its root (division, add, rsqrt), and 4 E to normalise."""
        rows, E = B * N if rows is None else rows, self.config.n_embd
        return Work((9 * E + 4) * rows, 2 * self._a * E * rows + 2 * self._a * E)

    def linear(self, k: int, n: int, activation: int = 0, residual: bool = False) -> Work:
        """x [rows, k] -> [rows, n] with its scales, its bias, `activation` operations an element, and the residual."""
        flops = n * (2 * k + self.dtypes.scales_an_output(k) + 1 + activation + int(residual)) * (B * N)
        nbytes = self._a * (k + n + n * int(residual)) * (B * N)
        return Work(flops, nbytes + self.dtypes.matrix_bytes(n, k) + self._a * n)

    def activation_flops(self) -> int:
        """Operations of the activation function, an element."""
        return ACTIVATION_FLOPS[self.config.activation_function][self.fast_math]

    def of_table(self, role: str) -> Dtypes:
        """The dtypes around the matrix that is the "embedding", or the "head"."""
        roles = set(TABLES) if self.config.tie_word_embeddings else {role}
        return self.dtypes.as_floats if roles & set(self.float_tables) else self.dtypes

    def weight_bytes(self) -> Fraction:
        """What one decode step reads whatever the batch and the context: every weight except the two tables' rows."""
        return sum((part.bytes.coefficient() for part in self.parts().values()), Fraction(0))

    def cache_bytes(self, batch: int, tokens: int) -> Fraction:
        """Keys and values of `tokens` tokens in every layer, for `batch` sequences."""
        return 2 * self._c * self.config.n_layer * self.config.n_embd * batch * tokens

    def _append(self) -> Work:
        """Keys and values of the rows read from their activations and written to the cache."""
        if not self.cached:
            return Work(Form(), Form())
        places = Form() if self.attention == "textbook" else 2 * INT * B
        return Work(Form(), 2 * (self._a + self._c) * self.config.n_embd * (B * N) + places)

    def _flash(self) -> Work:
        """A row sees the cached tokens and the rows up to its own. A head of D elements costs 4 D + 5 a slot: q . k and
        p . V, scale, maximum, subtract, exp, add; each output element is divided once. No score leaves the chip.
        """
        E, H, D = self.config.n_embd, self.config.n_head, self.config.head_dim
        slots = B * (N * P + (N * N + N) * Fraction(1, 2))
        moved = 2 * self._a * E * (B * N) + 2 * self._c * E * (B * (P + N))
        return Work(H * (4 * D + 5) * slots + E * (B * N), moved + 2 * INT * B)

    def _textbook(self) -> Work:
        """Four kernels: q k^T; scale and mask; softmax (5 a score); times v. Every row meets every slot."""
        E, H, D = self.config.n_embd, self.config.n_head, self.config.head_dim
        slots = N + P
        scores = H * (B * N * slots)
        keys = self._c if self.cached else self._a
        moved = 2 * self._a * E * (B * N) + 2 * keys * E * (B * slots) + MASK * (N * slots)
        return Work((4 * D + 6) * scores, moved + (4 * self._f + 2 * self._a) * scores)

    def _materialized(self) -> Work:
        """Ours for the rules to schedule: heads split, keys and values copied out of a cache of s slots, scores scaled
        and masked by position in the kernel that makes them, softmax, times v, heads merged. All s slots are computed.
        """
        E, H, D, a, f = self.config.n_embd, self.config.n_head, self.config.head_dim, self._a, self._f
        scores = H * (B * N * S)
        copied = 2 * a * E * (B * N) + 2 * (a + self._c) * E * (B * S) + 2 * a * E * (B * N)
        products = 2 * a * E * (B * N) + 2 * a * E * (B * S) + (2 * f + 2 * a) * scores
        return Work((4 * D + 6) * scores, copied + products + 2 * INT * B)

    @property
    def _a(self) -> Fraction:
        return self.dtypes.size("activations")

    @property
    def _c(self) -> Fraction:
        return self.dtypes.size("cache")

    @property
    def _f(self) -> Fraction:
        return self.dtypes.size("accumulation")


def naive_coefficients(work: Work) -> dict[str, Fraction]:
    """C1 … C6 of a pass without cached tokens (p = 0; a capacity of n slots where there is one), and B, the bytes a
    sequence. ValueError if the form has another term.
    """
    flops, nbytes = (form.uncapped().replace(p=0, s=N) for form in (work.flops, work.bytes))
    found = {
        "C1": flops.coefficient(b=1, n=1),
        "C2": flops.coefficient(b=1, n=2),
        "C3": nbytes.coefficient(),
        "C4": nbytes.coefficient(b=1, n=1),
        "C5": nbytes.coefficient(b=1, n=2),
        "C6": nbytes.coefficient(n=2),
        "B": nbytes.coefficient(b=1),
    }
    again = found["C3"] + found["C4"] * (B * N) + found["C5"] * (B * N * N) + found["C6"] * (N * N) + found["B"] * B
    if nbytes != again or flops != found["C1"] * (B * N) + found["C2"] * (B * N * N):
        raise ValueError("not of the form C1 BN + C2 BN^2, C3 + C4 BN + C5 BN^2 + C6 N^2")
    return found


def decode_coefficients(work: Work) -> dict[str, Fraction]:
    """Of one row a sequence that sees N slots, itself included (n = 1, p = N - 1; a capacity of N slots):
    FLOPs = D1 B + D2 BN, bytes = D3 + D4 B + D5 BN + D6 N.
    """
    flops, nbytes = (form.uncapped().replace(n=1).replace(p=N - 1, s=N) for form in (work.flops, work.bytes))
    return {
        "D1": flops.coefficient(b=1),
        "D2": flops.coefficient(b=1, n=1),
        "D3": nbytes.coefficient(),
        "D4": nbytes.coefficient(b=1),
        "D5": nbytes.coefficient(b=1, n=1),
        "D6": nbytes.coefficient(n=1),
    }
