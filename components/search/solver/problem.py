"""The problem that the search solves: one option a slot, the lowest sum of scores, sums of costs within limits.

    minimise    sum_kj score(k, j) x[k, j]
    subject to  sum_kj cost_r(k, j) x[k, j] <= limit_r    for each limited cost r
                sum_j x[k, j] = 1                         for each slot k

Numbers mean the decimals that they are written as: sums and comparisons that decide anything are made with fractions.

Shape letters: K slots, J options of a slot (padded), R limited costs.

Source: arXiv 2411.19146, appendix B. Attention and FFN may be slots of their own (decoupled blocks): scores add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Choice = tuple[int, ...]
"""Option number of each slot."""

ROUNDING = Fraction(1, 10**12)
"""Share by which a limit may be exceeded: limits are often sums of floats, which are rounded."""
MAX_DECIMALS = 9
"""Scores with so many decimals at most are recognised as multiples of a common step."""


@lru_cache(maxsize=2**16)
def exact(number: float) -> Fraction:
    """The decimal that a number is written as."""
    return Fraction(repr(float(number))) if not isinstance(number, int | Fraction) else Fraction(number)


@dataclass(frozen=True)
class Problem:
    """An instance, as arrays.

    Attributes:
        scores_KJ: what a choice adds up, to be minimised.
        costs_KJR: limited costs.
        allowed_KJ: which options exist and may be chosen.
        limits: of each cost, in the order of the last axis.
        names: of the costs.
        fixed: cost that every choice has, of each limit.
    """

    scores_KJ: Floats
    costs_KJR: Floats
    allowed_KJ: Flags
    limits: tuple[Fraction, ...]
    names: tuple[str, ...]
    fixed: tuple[Fraction, ...]

    @classmethod
    def of(
        cls,
        scores: Sequence[Sequence[float]],
        costs: Mapping[str, Sequence[Sequence[float]]],
        limits: Mapping[str, float],
        fixed: Mapping[str, float] | None = None,
    ) -> Self:
        """Make arrays of nested lists.

        Args:
            scores: of each option of each slot.
            costs: by name, of each option of each slot; those without a limit do not count.
            limits: by name of the cost.
            fixed: by name, cost that every choice has.
        """
        widths = np.array([len(row) for row in scores])
        allowed_KJ = np.arange(max(widths)) < widths[:, None]
        shape = allowed_KJ.shape

        def padded(rows: Sequence[Sequence[float]]) -> Floats:
            array = np.zeros(shape)
            array[allowed_KJ] = [value for row in rows for value in row]
            return array

        stacked = [padded(costs[name]) for name in limits]
        costs_KJR = np.stack(stacked, axis=2) if stacked else np.zeros((*shape, 0))
        return cls(
            scores_KJ=padded(scores),
            costs_KJR=costs_KJR,
            allowed_KJ=allowed_KJ,
            limits=tuple(exact(limit) for limit in limits.values()),
            names=tuple(limits),
            fixed=tuple(exact((fixed or {}).get(name, 0)) for name in limits),
        )

    def with_scores(self, scores_KJ: Floats) -> Self:
        """The same options and limits with something else to minimise."""
        return replace(self, scores_KJ=scores_KJ)

    def with_fixed(self, fixed: Mapping[int, int]) -> Self:
        """The same problem with the options of these slots fixed."""
        allowed_KJ = self.allowed_KJ.copy()
        for slot, option in fixed.items():
            allowed_KJ[slot] &= np.arange(allowed_KJ.shape[1]) == option
        return replace(self, allowed_KJ=allowed_KJ)

    def only(self, names: Sequence[str]) -> Self:
        """The same problem under some of its limits."""
        indices = [index for index, name in enumerate(self.names) if name in names]
        return replace(
            self,
            costs_KJR=self.costs_KJR[:, :, indices],
            limits=tuple(self.limits[index] for index in indices),
            names=tuple(self.names[index] for index in indices),
            fixed=tuple(self.fixed[index] for index in indices),
        )

    def with_no_good_cut(self, earlier: Choice, distance: int) -> Self:
        """The same problem for choices that differ from an earlier one in at least `distance` slots.

        Agreement is one more cost: 1 where a slot has the earlier option. Source: arXiv 2411.19146, appendix B.
        """
        agrees_KJ = np.arange(self.scores_KJ.shape[1]) == np.array(earlier)[:, None]
        return replace(
            self,
            costs_KJR=np.concatenate([self.costs_KJR, agrees_KJ[:, :, None]], axis=2),
            limits=(*self.limits, Fraction(len(earlier) - distance)),
            names=(*self.names, f"agreement {len(self.names)}"),
            fixed=(*self.fixed, Fraction(0)),
        )

    def objective(self, choice: Choice) -> Fraction:
        """Sum of the scores, exact."""
        return _total(self.scores_KJ, choice)

    def used(self, choice: Choice) -> tuple[Fraction, ...]:
        """Sum of each limited cost over the slots, exact."""
        return tuple(_total(self.costs_KJR[:, :, index], choice) for index in range(len(self.limits)))

    def fits(self, choice: Choice) -> bool:
        """Whether a choice is within all limits."""
        return all(
            used <= limit_with_tolerance
            for used, limit_with_tolerance in zip(self.used(choice), self.slacks, strict=True)
        )

    @property
    def slacks(self) -> tuple[Fraction, ...]:
        """Largest feasible sum over the slots of each cost."""
        return tuple(limit_with_tolerance(limit) - fixed for limit, fixed in zip(self.limits, self.fixed, strict=True))

    @cached_property
    def step(self) -> Fraction:
        """Objectives of two choices differ by a multiple of this; 0 where no such step is known."""
        for decimals in range(MAX_DECIMALS + 1):
            if (np.round(self.scores_KJ, decimals) == self.scores_KJ).all():
                whole_KJ = np.rint(self.scores_KJ * 10.0**decimals)
                if np.abs(whole_KJ).max(initial=0.0) > 1e15:
                    return Fraction(0)
                differences = (whole_KJ - whole_KJ[:, :1])[self.allowed_KJ].astype(np.int64)
                return Fraction(int(np.gcd.reduce(differences)), 10**decimals)
        return Fraction(0)


def limit_with_tolerance(limit: Fraction) -> Fraction:
    """The largest sum that counts as within a limit."""
    return limit + abs(limit) * ROUNDING


def _total(values_KJ: Floats, choice: Choice) -> Fraction:
    return sum((exact(values_KJ[slot, option]) for slot, option in enumerate(choice)), start=Fraction(0))
