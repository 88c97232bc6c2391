"""Bytes moved and floating-point operations done by a PrimFunc, counted before any rule touched it.

Operations are counted as written: an add, subtract, multiply, divide, minimum or maximum of floats is 1, so a
multiply-add is 2; a call of exp, tanh, rsqrt … is 1; casts, selects and integer arithmetic are free. Bytes are the
least that can be moved: each argument once. Of an argument that is read at places which depend on data (a token's
row of a table) only as many elements count as are read.

Our own kernels come scheduled, with loops that no longer show the work; they have closed forms (`OURS`), by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, TensorLoad

from gpt2_tvm.expressions import Text, combine

Product = tuple[str, ...]  # symbolic sizes multiplied with each other, sorted; () is 1
Polynomial = Counter[Product]  # product -> coefficient
FREE_CALLS = ("if_then_else", "reinterpret", "bitwise", "shift", "likely", "ret", "buffer_data", "call_extern", "tvm_")


def work_of(name: str, func: tirx.PrimFunc) -> tuple[Text | None, Text | None]:
    """(bytes, flops) of one call of `func`, which is named `name` in its module; None for a scheduled kernel
    without a closed form.
    """
    scheduled = func.attrs is not None and bool(func.attrs.get("tirx.is_scheduled", False))
    if not scheduled:
        counter = _Counter(func)
        return counter.bytes(), _text(counter.flops)
    closed = OURS.get(re.sub(r"\d+$", "", name))
    return closed([_Buffer(p) for p in func.params]) if closed else (None, None)


class _Counter:
    """Walks an unscheduled PrimFunc: loops (or block axes) multiply, every expression counts once an iteration."""

    def __init__(self, func: tirx.PrimFunc) -> None:
        self.func = func
        self.flops: Polynomial = Counter()
        self.loads: dict[Any, Polynomial] = {}  # elements read of a buffer at data-dependent places
        self.plain: dict[Any, Polynomial] = {}  # elements read or written elsewhere
        self._statement(func.body, Counter({(): 1}))

    def _statement(self, node: Any, times: Polynomial) -> None:
        if isinstance(node, tirx.SeqStmt):
            for child in node.seq:
                self._statement(child, times)
        elif isinstance(node, tirx.For):
            self._statement(node.body, _times(times, _polynomial(node.extent)))
        elif isinstance(node, s_tir.SBlockRealize):
            self._statement(node.block.body, times)  # the initial value of a reduction is a store, no arithmetic
        elif isinstance(node, tirx.BufferStore):
            self._access(self.plain, node.buffer, times)
            self._expression(node.value, times)
        elif isinstance(node, tirx.IfThenElse):
            self._expression(node.condition, times)
            for branch in (node.then_case, node.else_case):
                if branch is not None:
                    self._statement(branch, times)
        elif isinstance(node, (tirx.Bind, tirx.Evaluate)):
            self._expression(node.value, times)
        elif getattr(node, "body", None) is not None:
            self._statement(node.body, times)

    def _expression(self, root: Any, times: Polynomial) -> None:
        operations = [0]

        def arithmetic(node: Any) -> None:
            operations[0] += _is_float(node)

        def call(node: Call) -> None:
            name = str(getattr(node.op, "name", "")).rpartition(".")[2]
            operations[0] += _is_float(node) and not name.startswith(FREE_CALLS)

        def load(node: TensorLoad) -> None:
            gathered = any(_reads(index) for index in node.indices)
            self._access(self.loads if gathered else self.plain, node.source, times)

        arithmetics = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max)
        tvm_ffi.structural_walk(root, [(arithmetics, arithmetic), (Call, call), (TensorLoad, load)])
        if operations[0]:
            for product, coefficient in times.items():
                self.flops[product] += coefficient * operations[0]

    @staticmethod
    def _access(table: dict[Any, Polynomial], buffer: Any, times: Polynomial) -> None:
        table.setdefault(buffer, Counter()).update(times)

    def bytes(self) -> Text:
        """Of all arguments: gathered elements where that is fewer, else the whole argument or, where it is fewer,
        what is touched.
        """
        total: Polynomial = Counter()
        bounded: list[Text] = []
        for param in self.func.params:
            item = tvm.DataType(param.dtype).bits // 8
            whole = _scaled(_product(param.shape), item)
            gathered, plain = self.loads.get(param), self.plain.get(param)
            if gathered and not plain:
                some = _scaled(gathered, item)
                if set(some) == set(whole):
                    total.update(_least(whole, some))
                else:  # which is smaller, only the sizes can tell
                    bounded.append(combine("min", _text(whole), _text(some)))
            else:
                total.update(_least(whole, _scaled(plain, item)) if plain else Counter())
        text = _text(total)
        for part in bounded:
            text = combine("+", text, part)
        return text


def _least(a: Polynomial, b: Polynomial) -> Polynomial:
    """The smaller of two sizes where that can be told without knowing the symbolic ones, else the first."""
    return b if set(a) == set(b) and all(b[k] <= a[k] for k in a) else a


def _is_float(node: Any) -> bool:
    return str(node.ty).startswith(("float", "bfloat"))


def _reads(index: Any) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(index, [(TensorLoad, lambda _: found.append(True))])
    return bool(found)


def _polynomial(expr: Any) -> Polynomial:
    if isinstance(expr, int):
        return Counter({(): expr})
    kind = type(expr).__name__
    if kind == "IntImm":
        return Counter({(): int(expr.value)})
    if kind == "Mul":
        return _times(_polynomial(expr.a), _polynomial(expr.b))
    if kind == "Add":
        return _polynomial(expr.a) + _polynomial(expr.b)
    if kind == "Cast":
        return _polynomial(expr.value)
    if isinstance(expr, tirx.Var):
        return Counter({(str(expr.name),): 1})
    raise RuntimeError(f"cannot count the work of a loop over {expr} ({kind})")


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    out: Polynomial = Counter()
    for left, x in a.items():
        for right, y in b.items():
            out[tuple(sorted(left + right))] += x * y
    return out


def _product(extents: Any) -> Polynomial:
    out: Polynomial = Counter({(): 1})
    for extent in extents:
        out = _times(out, _polynomial(extent))
    return out


def _scaled(a: Polynomial, by: int) -> Polynomial:
    return Counter({product: coefficient * by for product, coefficient in a.items()})


def _text(a: Polynomial) -> Text:
    text: Text = 0
    for product in sorted(a, key=lambda p: (-len(p), p)):
        if a[product]:
            term: Text = a[product]
            for size in product:
                term = combine("*", term, size)
            text = combine("+", text, term)
    return text


# Closed forms of our own kernels ----------------------------------------------------------------------------------

Work = tuple[Text, Text]


class _Buffer:
    """A kernel's parameter: its extents as expressions, and bytes an element."""

    def __init__(self, param: Any) -> None:
        self.shape: list[Text] = [_text(_polynomial(extent)) for extent in param.shape]
        self.item = tvm.DataType(param.dtype).bits // 8
        self.dtype = str(param.dtype)
        self.elements = _text(_product(param.shape))
        self.bytes = _text(_scaled(_product(param.shape), self.item))


def _all(sign: str, first: Text, *more: Text) -> Text:
    for other in more:
        first = combine(sign, first, other)
    return first


def _attention(params: list[_Buffer]) -> Work:
    """Row t of n sees p + t + 1 slots (a tree's row: at most). A head of D elements costs 4D + 5 for each: q . k
    and p . V, scale, maximum, subtract, exp, add. Each row is divided at the end. The cache is read up to slot p +
    n.
    """
    qkv, cache, out = params[0], params[3], params[-1]
    b, n, _ = qkv.shape
    heads, size = int(cache.shape[2]), int(cache.shape[4])
    slots = _all("+", _all("*", n, "p"), combine("//", _all("*", n, combine("+", n, 1)), 2))
    flops = _all("*", b, combine("+", _all("*", heads * (4 * size + 5), slots), _all("*", heads * size, n)))
    queries = _all("*", qkv.item * heads * size, b, n)
    read = _all("*", 2 * cache.item * heads * size, b, combine("+", "p", n))
    small = [p.bytes for p in params if p.dtype == "int32"]
    return _all("+", queries, read, out.bytes, *small), flops


def _attention_append(params: list[_Buffer]) -> Work:
    """Attention that also moves this call's keys and values from qkv to the cache; it reads them there and not in
    the cache.
    """
    nbytes, flops = _attention(params)
    qkv, cache = params[0], params[3]
    b, n, _ = qkv.shape
    written = _all("*", 2 * cache.item * int(cache.shape[2]) * int(cache.shape[4]), b, n)
    return combine("+", nbytes, written), flops


def _persistent(params: list[_Buffer]) -> Work:
    """The products and the attention of one row, as `_attention` counts it, and 8 operations an element for each
    LayerNorm. Every weight and bias once (of the position table a row), keys and values of p slots, the new ones
    written, the logits; what lies between two phases stays in the cache of the device."""
    matrices = [p for p in params if len(p.shape) == 2 and p.dtype != "int32"]
    vectors = [p for p in params if len(p.shape) == 1 and p.dtype != "int32"][:-1]  # the last is scratch
    caches = [p for p in params if len(p.shape) == 5]
    logits, E = params[-2], int(matrices[0].shape[1])
    of_layers = 4 * len(caches)
    tokens, places, *head = matrices[of_layers:]
    products = [*matrices[:of_layers], *(head or [tokens])]
    flops: Text = sum(2 * int(m.shape[0]) * int(m.shape[1]) for m in products) + 8 * E * (2 * len(caches) + 1)
    nbytes: Text = sum(int(p.bytes) for p in (*products, *vectors, logits)) + places.item * E * (2 if head else 1)
    for cache in caches:
        heads, size = int(cache.shape[2]), int(cache.shape[4])
        flops = combine("+", flops, _all("*", heads * (4 * size + 5), combine("+", "p", 1)))
        nbytes = combine("+", nbytes, _all("*", 2 * cache.item * heads * size, combine("+", "p", 2)))
    return nbytes, flops


def _combine(params: list[_Buffer]) -> Work:
    """Per split: D multiply-adds, and maximum, subtract, exp, multiply, add for its sum; then a division an element."""
    parts, out = params[0], params[-1]
    size = int(parts.shape[4]) - 2
    per_split = _all("*", 2 * size + 5, *parts.shape[:4])
    return _all("+", *(p.bytes for p in params)), combine("+", per_split, out.elements)


def _append(params: list[_Buffer]) -> Work:
    """Keys and values of this call's rows: read once, written once."""
    qkv, positions, lengths, cache = params[:4]
    b, n, _ = qkv.shape
    rows = _all("*", 4 * cache.item * int(cache.shape[2]) * int(cache.shape[4]), b, n)
    return _all("+", rows, positions.bytes, lengths.bytes), 0


def _keep(params: list[_Buffer]) -> Work:
    """At most every slot of the path: read once, written once."""
    cache, positions, path, lengths = params[:4]
    rows = _all("*", 4 * cache.item * int(cache.shape[2]) * int(cache.shape[4]), path.elements)
    return _all("+", rows, positions.bytes, path.bytes, lengths.bytes), 0


def _greedy(params: list[_Buffer]) -> Work:
    """A comparison a logit; reads and writes a token, a position and a slot of the history a sequence."""
    logits, token, positions, _ = params
    small = combine("*", 2, combine("+", token.bytes, positions.bytes))
    return _all("+", logits.bytes, small, token.bytes), logits.elements


def _sample(params: list[_Buffer]) -> Work:
    """Without top-k and top-p, whose halvings depend on the settings and read the logits again: two comparisons, six
    operations for the noise (two of them logarithms, two negations) and four to scale and add it, a logit."""
    logits, settings, choice, token, positions, _ = params
    small = combine("*", 2, combine("+", token.bytes, positions.bytes))
    nbytes = _all("+", logits.bytes, settings.bytes, choice.bytes, small, token.bytes)
    return nbytes, _all("*", 12, logits.elements)


def _accept(params: list[_Buffer]) -> Work:
    """Integers alone: of the history the drafted tokens, which `best` has as many of; the rest once, what is in place
    twice."""
    best, lengths, token, positions, drafting, _, told = params
    twice = combine("*", 2, _all("+", token.bytes, positions.bytes))
    return _all("+", best.bytes, best.bytes, lengths.bytes, drafting.bytes, told.bytes, twice), 0


def _most_likely(params: list[_Buffer]) -> Work:
    """A comparison a logit."""
    return _all("+", *(p.bytes for p in params)), params[0].elements


def _near_ties(params: list[_Buffer]) -> Work:
    """A maximum and a minimum a logit; a multiply, a subtract and a maximum a row."""
    logits, best = params
    nbytes = _all("+", logits.bytes, combine("*", 2, best.bytes))
    return nbytes, _all("+", _all("*", 2, logits.elements), _all("*", 3, best.elements))


def _choices(params: list[_Buffer]) -> Work:
    """A comparison for each choice, a subtraction, an exponential and an addition a logit; the logits count as read
    once: a row stays in the cache, or nearly so."""
    logits, ids, logs = params[0], params[-2], params[-1]
    each = combine("*", ids.shape[-1], logits.elements)
    return _all("+", logits.bytes, ids.bytes, logs.bytes), _all("+", each, _all("*", 3, logits.elements))


def _told(params: list[_Buffer]) -> Work:
    """Integers alone, each once."""
    return _all("+", *(p.bytes for p in params)), 0


def _draft_scores(params: list[_Buffer]) -> Work:
    """A token: six operations for the noise, a maximum, a logarithm and an addition. Of what is kept a row a sequence
    is written, as large as the shares."""
    shares, positions, seeds, _, scores = params
    return _all("+", shares.bytes, shares.bytes, positions.bytes, seeds.bytes, scores.bytes), _all(
        "*", 9, shares.elements
    )


def _own_scores(params: list[_Buffer]) -> Work:
    """As `_draft_scores`, with a subtraction and a comparison more; of the shares and of the draft's a row is read."""
    stood, positions, seeds, scores = params[-4:]
    return _all("+", *(p.bytes for p in (scores, scores, scores, stood, positions, seeds))), _all(
        "*", 11, scores.elements
    )


def _accept_drawn(params: list[_Buffer]) -> Work:
    """At most a share of the target's and of the draft's, and an id, for each row but the first: as many as the answer
    has bytes, or fewer."""
    *_, positions, lengths, seeds, stood = params
    return _all("+", positions.bytes, lengths.bytes, seeds.bytes, _all("*", 2, stood.bytes)), 0


def _finish_drawn(params: list[_Buffer]) -> Work:
    """Integers alone, as `_accept`."""
    best, stood, lengths, token, positions, drafting, _, told = params
    twice = combine("*", 2, _all("+", token.bytes, positions.bytes))
    return _all("+", best.bytes, stood.bytes, lengths.bytes, drafting.bytes, told.bytes, told.bytes, twice), 0


def _log_prob(params: list[_Buffer]) -> Work:
    """Maximum, subtract, exp and add a logit; then a logarithm and two subtractions a row."""
    logits, _, out = params
    return _all("+", *(p.bytes for p in params)), _all("+", _all("*", 4, logits.elements), _all("*", 3, out.elements))


OURS: dict[str, Callable[[list[_Buffer]], Work]] = {
    "chain_attention": _attention,
    "tree_attention": _attention,
    "prefill_attention": _attention,
    "decode_attention": _attention,
    "decode_attention_append": _attention_append,
    "tree_attention_append": _attention_append,
    "persistent_step": _persistent,
    "tree_attention_combine": _combine,
    "decode_attention_combine": _combine,
    "kv_append": _append,
    "keep_branch": _keep,
    "greedy_advance": _greedy,
    "sample_advance": _sample,
    "accept_draft": _accept,
    "most_likely": _most_likely,
    "near_ties": _near_ties,
    "choices": _choices,
    "tell_host": _told,
    "draft_scores": _draft_scores,
    "accept_drawn": _accept_drawn,
    "own_scores": _own_scores,
    "finish_drawn": _finish_drawn,
    "log_prob": _log_prob,
}
