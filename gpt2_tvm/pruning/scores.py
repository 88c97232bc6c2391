"""What a head, a unit or an input is worth: the L2 norm of the weights that would go with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.pruning.blocks import Tensors


def block_scores(tensors: Tensors, config: GPT2Config, layer: int) -> dict[str, np.ndarray]:
    """Norms over one block's dimensions, float64: "heads" [H] of q, k and v rows and c_proj's columns; "inner" [I] of
    c_fc's row and c_proj's column; "attn", "proj", "fc" and "units" of the input columns of c_attn, attn.c_proj, c_fc
    and mlp.c_proj.

    Inputs that come from a LayerNorm have its weight folded in: it says how large the input is.
    """
    D, heads = config.head_dim, config.heads(layer)
    qkv, up, down = (tensors[f"{name}.weight"] for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"))
    proj = _columns(tensors["attn.c_proj.weight"])
    by_channel = np.zeros(heads * D)
    by_channel[tensors.get("attn.kept", np.arange(heads * D))] = proj
    rows = _columns(qkv.T).reshape(3, heads, D).sum((0, 2))
    units = _columns(down)
    squares = {
        "heads": rows + by_channel.reshape(heads, D).sum(1),
        "inner": _columns(up.T) + units,
        "attn": _columns(qkv) * _square(tensors["ln_1.weight"]),
        "proj": proj,
        "fc": _columns(up) * _square(tensors["ln_2.weight"]),
        "units": units,
    }
    return {name: np.sqrt(values) for name, values in squares.items()}


def _square(array: np.ndarray) -> np.ndarray:
    return np.square(array.astype(np.float64))


def _columns(matrix: np.ndarray) -> np.ndarray:
    """Sum of squares of each column, in float64."""
    return np.einsum("nk,nk->k", matrix, matrix, dtype=np.float64, casting="unsafe")


def kept_count(whole: int, share: float, multiple: int, present: int) -> int:
    """How many of `whole` stay when `share` of them goes: a multiple of `multiple`, at least one of these, and no more
    than are there."""
    wanted = (1 - share) * whole
    return min(present, max(1, int(np.ceil(wanted / multiple - 1e-9))) * multiple)


def choose(
    scores: Sequence[np.ndarray], whole: Sequence[int], share: float, scope: str, multiple: int
) -> list[np.ndarray]:
    """Which dimensions stay in each layer: booleans, one array a layer.

    Args:
        scores: of each layer's dimensions, those that are left.
        whole: how many each layer had at first; `share` is of these, so that a second cut by the same share cuts
            nothing.
        scope: "layer" cuts each layer by the share; "global" ranks all layers together, and leaves each at least
            `multiple`.
        multiple: what counts are rounded up to.
    """
    counts = [kept_count(w, share, multiple, len(s)) for s, w in zip(scores, whole, strict=True)]
    if scope == "global":
        ranked = np.sort(np.concatenate(list(scores)))[::-1]
        least = ranked[sum(counts) - 1]
        counts = [min(len(s), max(1, -(-int((s >= least).sum()) // multiple)) * multiple) for s in scores]
    return [_largest(s, count) for s, count in zip(scores, counts, strict=True)]


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True  # of equals the first
    return mask
