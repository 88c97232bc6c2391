"""Where two counts differ: each reason with its exact share in FLOPs and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from gpt2_tvm.theory.closed import INT, Model, Work
from gpt2_tvm.theory.form import B, Form, N, Number


@dataclass(frozen=True)
class Reason:
    """Why the second count has `flops` and `bytes` more (or less, where negative) than the first, at some sizes."""

    why: str
    flops: Fraction
    bytes: Fraction


@dataclass(frozen=True)
class Layout:
    """What of a target the closed forms leave out.

    panel_rows: rows of a weight's panel, 0 for plain rows. splits: pieces of the context in decode's attention, 1 for
    one kernel.
    """

    panel_rows: int = 0
    splits: int = 1


def module_reasons(model: Model, layout: Layout, phase: str, b: int, n: int, p: int) -> dict[str, list[Reason]]:
    """By part: why the module's count differs from `model`'s closed form. Empty lists where they are equal."""
    found: dict[str, list[Reason]] = {"embedding": [], "MHA": [], "MLP": [], "head": []}
    static_rows = b * n if phase == "decode" else None
    for part, reason in _padding(model, layout.panel_rows, static_rows):
        found[part].append(reason)
    tables = (_padded_table(model, layout.panel_rows, b * n), _repeated_scale(model, b * n))
    found["embedding"] += [reason for reason in tables if reason.bytes]
    if layout.splits > 1 and phase == "decode" and model.attention == "flash":
        found["MHA"].append(_split(model, layout.splits, b, n))
    return found


def _padding(model: Model, panel: int, static_rows: int | None) -> list[tuple[str, Reason]]:
    """Panels filled up with rows of zeros: read with the rest, except by a single row, of which TVM knows that it
    touches none of them.
    """
    if not panel or static_rows == 1:
        return []
    c = model.config
    E, inner = c.n_embd, c.n_inner
    matrices = {
        "MHA": [(3 * E, E, c.n_layer), (E, E, c.n_layer)],
        "MLP": [(inner, E, c.n_layer), (E, inner, c.n_layer)],
        "head": [(c.vocab_size, E, 1)],
    }
    items = {part: model.of_table("head") if part == "head" else model.dtypes for part in matrices}
    sums = {
        part: items[part].size("weights") * sum((-rows % panel) * k * times for rows, k, times in of)
        for part, of in matrices.items()
    }
    why = f"weights lie in panels of {panel} rows; the last one of a matrix is filled up"
    return [(part, Reason(why, Fraction(0), Fraction(extra))) for part, extra in sums.items() if extra]


def _padded_table(model: Model, panel: int, rows: int) -> Reason:
    """The token table's limit is its padded size, which matters where more rows are read than it has."""
    V, E, item = model.config.vocab_size, model.config.n_embd, model.of_table("embedding").size("weights")
    padded = V + (-V % panel if panel else 0)
    extra = item * E * (min(padded, rows) - min(V, rows))
    return Reason("the token table, read whole, is padded to whole panels", Fraction(0), extra)


def _repeated_scale(model: Model, rows: int) -> Reason:
    """A token's int8 row has one scale, which the module's count takes once for each element that reads it."""
    V, E = model.config.vocab_size, model.config.n_embd
    scaled = model.of_table("embedding").weights == "int8"
    extra = 4 * (min(V, rows * E) - min(V, rows)) if scaled else 0
    return Reason("a token's scale counts for each element of its row", Fraction(0), Fraction(extra))


def _split(model: Model, splits: int, b: int, n: int) -> Reason:
    """Each piece of a head's context writes D sums, a maximum and a sum of weights in float32 in place of the output;
    a second kernel reads them (2 D + 5 operations a piece, a division an element) and writes the output.
    """
    c = model.config
    pieces = b * n * c.n_head * splits
    output = model.dtypes.size("activations") * c.n_embd * b * n
    parts = 4 * pieces * (c.head_dim + 2)
    nbytes = (parts - output) + (parts + output + 2 * INT * b)
    flops = pieces * (2 * c.head_dim + 5) + b * n * c.n_embd
    why = f"attention in {splits} pieces a head, so that one row fills the device, and a kernel that merges them"
    return Reason(why, Fraction(c.n_layer * flops), Fraction(c.n_layer * nbytes))


def textbook_reasons(textbook: Model, ours: Model, b: int, n: int) -> list[Reason]:
    """Why a naive pass of `ours` (flash) differs from the textbook's (not cached); the shares add up to the
    difference of the two closed forms.
    """
    c, d = ours.config, ours.dtypes
    a, cache, f = d.size("activations"), d.size("cache"), d.size("accumulation")
    L, E, H, D = c.n_layer, c.n_embd, c.n_head, c.head_dim
    R, square = B * N, B * N * N
    zero = Form()
    shares: list[tuple[str, Work]] = [
        (
            "causal: a row meets the slots up to its own, half of N^2",
            Work((square - R) * Fraction(-H * (4 * D + 5), 2), zero),
        ),
        (
            "softmax divides each output element once instead of each score",
            Work(E * R - H * square, zero),
        ),
        ("scores never leave the chip", Work(zero, -(4 * f + 2 * a) * H * square)),
        ("the mask is computed from positions", Work(zero, -(N * N))),
        (
            "keys and values go to the cache and are read there",
            Work(zero, (2 * (a + cache) + 2 * (cache - a)) * E * R),
        ),
        ("positions and lengths of the sequences", Work(zero, 4 * INT * B)),
    ]
    return [Reason(why, L * work.flops.at(b, n), L * work.bytes.at(b, n)) for why, work in shares]


def unexplained(first: Work, second: tuple[Number, Number], reasons: list[Reason], b: int, n: int, p: int) -> Reason:
    """What is left of (second - first) after the reasons; zero and zero where all is said."""
    flops = second[0] - first.flops.at(b, n, p) - sum(r.flops for r in reasons)
    nbytes = second[1] - first.bytes.at(b, n, p) - sum(r.bytes for r in reasons)
    return Reason("not explained", Fraction(flops), Fraction(nbytes))
