"""Dual bounds: the Lagrangian of a problem, and the multipliers that maximise it, from the linear relaxation.

    L(lambda) = sum_k min_j (score(k, j) + sum_r lambda_r cost_r(k, j)) - sum_r lambda_r limit_r,    lambda >= 0

No feasible choice scores below L, whatever the multipliers are: so approximate multipliers are enough. The rounding
error of L in floats is bounded by `Scaled.rounding_error`.

Shape letters: K slots, J options of a slot (padded), R limited costs.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from components.search.solver.problem import Flags, Floats, Problem

SLACK_COST = 1e5
"""Penalty of exceeding a limit by all of it in the relaxation, so that it always has a solution; scores are below 1."""

PRIMAL = 4
"""HiGHS's number for the primal simplex: of its methods the quickest where options are many and limits few."""

SMALLEST_EXPONENT = -1022
"""2 to the power of its negative is still a float."""


@dataclass(frozen=True)
class Scaled:
    """A problem with all numbers brought to about 1 by powers of two, which is exact.

    Attributes:
        scores_KJ: scores; divided by 2^score_exponent.
        costs_KJR: costs; divided by 2^cost_exponents.
        slacks_R: largest feasible sum of each cost, likewise.
        allowed_KJ: options that may be chosen.
        score_exponent: see above.
        cost_exponents: see above.
    """

    scores_KJ: Floats
    costs_KJR: Floats
    slacks_R: Floats
    allowed_KJ: Flags
    score_exponent: int
    cost_exponents: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem) -> "Scaled":
        """Scale a problem."""
        slacks_R = np.array([float(slack) for slack in problem.slacks])
        sizes = np.maximum(np.abs(slacks_R), np.abs(problem.costs_KJR).max(axis=(0, 1), initial=0.0))
        exponents = tuple(_exponent(size) for size in sizes)
        score_exponent = _exponent(np.abs(problem.scores_KJ[problem.allowed_KJ]).max(initial=0.0))
        units_R = np.array([2.0**-exponent for exponent in exponents])
        return cls(
            scores_KJ=np.ldexp(problem.scores_KJ, -score_exponent),
            costs_KJR=problem.costs_KJR * units_R,
            slacks_R=slacks_R * units_R,
            allowed_KJ=problem.allowed_KJ,
            score_exponent=score_exponent,
            cost_exponents=exponents,
        )

    def priced(self, multipliers_R: Floats) -> Floats:
        """Score and priced costs of each option (K, J); infinite where it is not allowed."""
        priced_KJ = self.scores_KJ + self.costs_KJR @ multipliers_R
        priced_KJ[~self.allowed_KJ] = np.inf
        return priced_KJ

    def bound(self, multipliers_R: Floats) -> float:
        """The Lagrangian, up to `rounding_error`."""
        return float(self.priced(multipliers_R).min(axis=1).sum() - multipliers_R @ self.slacks_R)

    def rounding_error(self, multipliers_R: Floats) -> Floats:
        """Bound on the rounding error of a Lagrangian in floats; multipliers may have leading axes.

        Each term carries the rounding of its parts and of the sum: at most a unit for each addition.
        """
        of_scores, of_costs_R = self._magnitudes
        terms = len(self.scores_KJ) + len(self.slacks_R) + 8
        rounding_error: Floats = 2 * terms * np.finfo(np.float64).eps * (of_scores + multipliers_R @ of_costs_R)
        return rounding_error

    @cached_property
    def _magnitudes(self) -> tuple[float, Floats]:
        """The most that scores, and each priced cost with its limit, can add to a Lagrangian."""
        score = np.abs(np.where(self.allowed_KJ, self.scores_KJ, 0.0)).max(axis=1).sum()
        costs_R = np.abs(np.where(self.allowed_KJ[:, :, None], self.costs_KJR, 0.0)).max(axis=1).sum(axis=0)
        return float(score), costs_R + np.abs(self.slacks_R)

    def in_units(self, multipliers_R: Floats) -> tuple[float, ...]:
        """Multipliers as scores a unit of cost."""
        pairs = zip(multipliers_R.tolist(), self.cost_exponents, strict=True)
        return tuple(math.ldexp(multiplier, self.score_exponent - exponent) for multiplier, exponent in pairs)


def best_multipliers(scaled: Scaled) -> Floats:
    """Multipliers whose Lagrangian is about as high as it gets: the dual values of the linear relaxation, by HiGHS."""
    num_limits = len(scaled.slacks_R)
    if num_limits == 0:
        return np.zeros(0)
    import highspy  # takes its time to load, and is not needed to check a certificate

    slots, options = np.nonzero(scaled.allowed_KJ)
    num_slots, num_options = len(scaled.allowed_KJ), len(slots)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = num_options + num_limits, num_slots + num_limits
    lp.col_cost_ = np.concatenate([scaled.scores_KJ[slots, options], np.full(num_limits, SLACK_COST)])
    lp.col_lower_, lp.col_upper_ = np.zeros(lp.num_col_), np.full(lp.num_col_, highspy.kHighsInf)
    lp.row_lower_ = np.concatenate([np.ones(num_slots), np.full(num_limits, -highspy.kHighsInf)])
    lp.row_upper_ = np.concatenate([np.ones(num_slots), scaled.slacks_R])
    rows = np.concatenate([slots[:, None], np.tile(num_slots + np.arange(num_limits), (num_options, 1))], axis=1)
    values = np.concatenate([np.ones((num_options, 1)), scaled.costs_KJR[slots, options]], axis=1)
    width = 1 + num_limits
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.concatenate(
        [np.arange(num_options + 1) * width, num_options * width + 1 + np.arange(num_limits)]
    )
    lp.a_matrix_.index_ = np.concatenate([rows.ravel(), num_slots + np.arange(num_limits)])
    lp.a_matrix_.value_ = np.concatenate([values.ravel(), -np.ones(num_limits)])
    with _standard_output_closed():  # its constructor prints a banner that no option turns off
        highs = highspy.Highs()
    settings = {"output_flag": False, "threads": 1, "random_seed": 0, "presolve": "off", "simplex_strategy": PRIMAL}
    for name, value in settings.items():
        highs.setOptionValue(name, value)
    highs.passModel(lp)
    highs.run()
    duals_R = -np.array(highs.getSolution().row_dual[-num_limits:])
    return np.clip(duals_R, 0.0, SLACK_COST)


def _exponent(size: float) -> int:
    """The power of two above a size; 0 for 0, and no less than can be divided by."""
    return max(math.frexp(float(size))[1], SMALLEST_EXPONENT)


@contextlib.contextmanager
def _standard_output_closed() -> Iterator[None]:
    """Send what C code writes to standard output nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
