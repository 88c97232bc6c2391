"""Sizes as text: integer expressions over an exported function's symbolic sizes (b sequences, n rows), for files
that outlive TVM.

Grammar, a part of Python's: integers, names, ``+ - * // %``, ``min(x, y)``, ``max(x, y)`` and parentheses; ``//``
and ``%`` round down. `to_text` writes them from TIR, `evaluate` computes them without running any code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}
BINARY = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%"}  # TIR's nodes

Text = int | str  # an expression: a number, or text in the grammar


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def evaluate(text: Text, sizes: Mapping[str, int]) -> int:
    """The value of an expression where each name has the value in `sizes`. ValueError for anything outside the
    grammar.
    """
    if isinstance(text, int):
        return text

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return int(sizes[node.id])
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            if node.keywords or len(node.args) < 2:
                raise ValueError(f"{text!r}: {node.func.id} takes two expressions or more")
            return FUNCTIONS[node.func.id](*map(value, node.args))
        raise ValueError(f"{text!r} is no expression over {', '.join(sizes) or 'no names'}: {ast.unparse(node)}")

    try:
        return value(_parse(text))
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is no expression: {error}") from error


def to_text(expr: Any, leaf: Callable[[Any], Text | None]) -> Text:
    """TIR's integer expression as text (an int where it is constant).

    leaf: asked first at every node; what it returns stands for the node, None where it does not know it.
    RuntimeError for a node that the grammar cannot say.
    """
    if isinstance(expr, int):
        return expr
    known = leaf(expr)
    if known is not None:
        return known
    kind = type(expr).__name__
    if kind == "IntImm":
        return int(expr.value)
    if kind == "Cast":  # sizes fit every integer type that TVM computes them in
        return to_text(expr.value, leaf)
    if kind in BINARY:
        return combine(BINARY[kind], to_text(expr.a, leaf), to_text(expr.b, leaf))
    if kind in ("Min", "Max"):
        return combine(kind.lower(), to_text(expr.a, leaf), to_text(expr.b, leaf))
    raise RuntimeError(f"the size {expr} ({kind}) cannot be written as an expression over symbolic sizes")


def combine(sign: str, a: Text, b: Text) -> Text:
    """The text of ``a sign b`` (or ``min(a, b)``), folded where both are numbers or one is neutral."""
    text = f"{sign}({a}, {b})" if sign in FUNCTIONS else f"{_operand(sign, a, False)} {sign} {_operand(sign, b, True)}"
    if isinstance(a, int) and isinstance(b, int):
        return evaluate(text, {})
    if sign == "*" and 1 in (a, b):
        return b if a == 1 else a
    if sign == "*" and 0 in (a, b):
        return 0
    if (sign == "//" and b == 1) or (sign in "+-" and b == 0):
        return a
    return b if sign == "+" and a == 0 else text


def _operand(sign: str, text: Text, right: bool) -> str:
    """An operand of `sign`, in parentheses unless the text reads the same without."""
    if isinstance(text, int):
        return str(text) if text >= 0 else f"({text})"
    node = _parse(text)
    inner = type(node.op) if isinstance(node, ast.BinOp) else None
    plain = inner is None or (sign in "+-" and inner is ast.Mult)
    plain = plain or (sign == "+" and inner is ast.Add) or (sign in "+-" and not right and inner in (ast.Add, ast.Sub))
    plain = plain or (sign == "*" and inner is ast.Mult)
    return text if plain else f"({text})"
