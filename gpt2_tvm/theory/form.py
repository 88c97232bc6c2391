"""Polynomials in the sizes of a call, with exact coefficients: what a closed form is made of.

b sequences, n rows of this call, p tokens in the cache before it, s slots of the cache's capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Union

SIZES = ("b", "n", "p", "s")
Monomial = tuple[int, ...]  # exponents of SIZES
Number = Union[int, Fraction]  # noqa: UP007, isinstance needs it beside Form below
ONE: Monomial = (0, 0, 0, 0)


class Form:
    """A polynomial, plus terms ``min(limit, share * b * n)``: a table is read a row a token, and never more than once.

    Immutable. `+`, `-` and `*` work with numbers too; only a form without capped terms can be a factor of another.
    """

    def __init__(
        self, terms: Mapping[Monomial, Number] | None = None, capped: tuple[tuple[Fraction, Fraction], ...] = ()
    ) -> None:
        self.terms: dict[Monomial, Fraction] = {m: Fraction(c) for m, c in (terms or {}).items() if c}
        self.capped = capped

    @classmethod
    def number(cls, value: Number) -> Form:
        """A constant."""
        return cls({ONE: value})

    def __add__(self, other: Form | Number) -> Form:
        other = other if isinstance(other, Form) else Form.number(other)
        total = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient
        return Form(total, self.capped + other.capped)

    __radd__ = __add__

    def __neg__(self) -> Form:
        return self * -1

    def __sub__(self, other: Form | Number) -> Form:
        return self + (-other)

    def __mul__(self, other: Form | Number) -> Form:
        if not isinstance(other, Form):
            factor = Fraction(other)
            scaled = tuple((limit * factor, share * factor) for limit, share in self.capped)
            if factor < 0 and scaled:
                raise ValueError("a capped term cannot be negative")
            return Form({m: c * factor for m, c in self.terms.items()}, scaled)
        if self.capped or other.capped:
            raise ValueError("a capped term can only be multiplied by a number")
        total: dict[Monomial, Fraction] = {}
        for left, x in self.terms.items():
            for right, y in other.terms.items():
                monomial = tuple(i + j for i, j in zip(left, right, strict=True))
                total[monomial] = total.get(monomial, Fraction(0)) + x * y
        return Form(total)

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and (self.terms, sorted(self.capped)) == (other.terms, sorted(other.capped))

    def __hash__(self) -> int:
        return hash((frozenset(self.terms.items()), self.capped))

    def replace(self, **values: Form | Number) -> Form:
        """The form with some of b, n, p, s replaced. b and n must stay where there are capped terms."""
        if self.capped and {"b", "n"} & set(values):
            raise ValueError("b and n stand in capped terms")
        total = Form(None, self.capped)
        for monomial, coefficient in self.terms.items():
            term = Form.number(coefficient)
            for name, symbol, exponent in zip(SIZES, SYMBOLS, monomial, strict=True):
                for _ in range(exponent):
                    term = term * values.get(name, symbol)
            total = total + term
        return total

    def uncapped(self) -> Form:
        """The same where no capped term has reached its limit: a polynomial."""
        return Form(self.terms) + B * N * sum((share for _, share in self.capped), Fraction(0))

    def coefficient(self, b: int = 0, n: int = 0, p: int = 0, s: int = 0) -> Fraction:
        """The coefficient of b^b n^n p^p s^s."""
        return self.terms.get((b, n, p, s), Fraction(0))

    def at(self, b: Number, n: Number, p: Number = 0, s: Number = 0) -> Fraction:
        """The value for these sizes, exactly."""
        sizes = (b, n, p, s)
        total = sum((min(limit, share * b * n) for limit, share in self.capped), Fraction(0))
        for monomial, coefficient in self.terms.items():
            for size, exponent in zip(sizes, monomial, strict=True):
                coefficient *= size**exponent
            total += coefficient
        return total


SYMBOLS = tuple(Form({tuple(int(i == j) for j in range(len(SIZES))): 1}) for i in range(len(SIZES)))
B, N, P, S = SYMBOLS


def rows_of_table(limit: Number, share: Number) -> Form:
    """``min(limit, share * b * n)``."""
    return Form(None, ((Fraction(limit), Fraction(share)),))
