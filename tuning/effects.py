"""What each rule does, from a factorial design: main effects and pairwise interactions on the logarithm of a rate.

With every rule on or off there are 2^k sets. The main effect of a rule is the mean of log(rate) over the sets that have
it, less the mean over those that do not: on the scale of rates a factor, "2.0 times as fast". The interaction of two is
half the difference between the effect of one with and without the other: below 1 they compete for the same functions,
above 1 one needs the other. One rule at a time and one left out tell neither (Box, Hunter & Hunter, Statistics for
Experimenters, chapter 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median, stdev

import numpy as np


@dataclass(frozen=True)
class Effect:
    """One term. Of a rate as factors: `ratio` = exp(log_effect).

    Attributes:
        factors: one name (a main effect) or two (an interaction).
        log_effect: on the natural logarithm of the rate; None where the sets that ran cannot tell it.
        log_effect_sd: its standard error, from the spread of the repeats; None likewise.
    """

    factors: tuple[str, ...]
    log_effect: float | None
    log_effect_sd: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.log_effect is None else math.exp(self.log_effect)

    @property
    def ratio_sd(self) -> float | None:
        """The standard error of `ratio`, to first order."""
        if self.log_effect is None or self.log_effect_sd is None:
            return None
        return math.exp(self.log_effect) * self.log_effect_sd


@dataclass(frozen=True)
class Effects:
    """The terms of one design.

    Attributes:
        terms: main effects in the order of the factors, then the pairs.
        cells, of_cells: sets with a rate, and all 2^k. With all of them a term is the contrast of means above; with
            fewer it is a least-squares fit of main effects and pairs, which takes higher interactions for zero.
        residual_sd: of log(rate), what main effects and pairs leave unexplained (the root mean square over the cells).
    """

    terms: tuple[Effect, ...]
    cells: int
    of_cells: int
    residual_sd: float

    def of(self, *factors: str) -> Effect:
        """The term of these factors, in any order."""
        return next(term for term in self.terms if set(term.factors) == set(factors))


def effects(factors: Sequence[str], rates: Mapping[frozenset[str], Sequence[float]]) -> Effects:
    """Main effects and pairwise interactions.

    Args:
        factors: names, at least one.
        rates: for each set of factors that are on, the repeats of its rate (any unit, positive); sets that failed are
            left out or have no repeats.

    Raises ValueError for a rate that is not positive or a set with an unknown factor.
    """
    names = list(factors)
    cells = [(on, list(values)) for on, values in rates.items() if len(values)]
    for on, values in cells:
        if not on <= set(names) or any(not v > 0 for v in values):
            raise ValueError(f"cell {sorted(on)}: rates must be positive and factors among {names}")
    terms = [(name,) for name in names] + list(combinations(names, 2))
    of_cells = 2 ** len(names)
    if not cells:
        return Effects(tuple(Effect(term, None, None) for term in terms), 0, of_cells, 0.0)
    signs = np.array([[1.0 if name in on else -1.0 for name in names] for on, _ in cells])
    column = {name: i for i, name in enumerate(names)}
    # In -1/+1 coding a coefficient is half an effect, for pairs as for single factors.
    design = np.column_stack([np.ones(len(cells))] + [signs[:, [column[f] for f in term]].prod(1) for term in terms])
    logs = np.array([math.log(median(values)) for _, values in cells])
    variances = np.array([_variance_of_log_median(values) for _, values in cells])
    inverse = np.linalg.pinv(design)
    fitted = inverse @ logs
    spread = np.sqrt((inverse**2) @ variances)
    # A coefficient can be told where its unit vector lies in the row space of the design.
    told = np.abs(np.diag(inverse @ design) - 1) < 1e-9
    residual = logs - design @ fitted
    made = [
        Effect(term, 2 * float(fitted[i]), 2 * float(spread[i])) if told[i] else Effect(term, None, None)
        for i, term in enumerate(terms, start=1)
    ]
    return Effects(tuple(made), len(cells), of_cells, float(np.sqrt((residual**2).mean())))


def _variance_of_log_median(values: Sequence[float]) -> float:
    """Of n repeats, about pi/2 times the variance of their mean; 0 where there is one repeat alone."""
    if len(values) < 2:
        return 0.0
    return math.pi / 2 * stdev(math.log(v) for v in values) ** 2 / len(values)
