"""Incumbents: the best feasible choices found so far, and a local search that finds better ones.

The pool has `count` choices, each the best of those that differ from all before in at least `distance` slots. Its worst
score is the cutoff. It can rise again when a diverse solution replaces near duplicates, so pruned nodes may have to be
searched again; `cutoff_holds` tells.

Shape letters: K slots, J options of a slot (padded), R limited costs, M single changes.
"""

import bisect
from fractions import Fraction

import numpy as np

from components.search.solver.lagrangian_bound import Scaled
from components.search.solver.problem import Choice, Floats

NUM_CHANGES = 100
"""Options that are tried, those of least reduced cost."""
EXCESS_PRICE = 1e4
"""Penalty of exceeding a limit by all of it; scores are below 1."""
MAX_ROUNDS = 60
"""Pairs of changes at most."""


Scored = tuple[Choice, Fraction]
"""A choice and its exact score."""


class IncumbentPool:
    """The best feasible choices found so far.

    Attributes:
        cutoff: choices with this score or more are not wanted.
        is_full: whether the cutoff is the score of a choice; else it is above every score.
        found: the choices, best first.
        lowest_cutoff: the lowest cutoff that nodes were pruned with.
    """

    def __init__(self, count: int, distance: int, ceiling: Fraction) -> None:
        """Begin with none.

        Args:
            count: number of choices wanted.
            distance: number of slots in which any two differ at least.
            ceiling: a score above that of any choice.
        """
        self.count, self.distance = count, distance
        self.cutoff, self.is_full = ceiling, False
        self.lowest_cutoff = ceiling
        self.found: list[Scored] = []

    def offer(self, choice: Choice, objective: Fraction) -> None:
        """Add a choice that scores less than the cutoff."""
        scored = choice, objective
        place = bisect.bisect_left(self.found, _order(scored), key=_order)
        if self.found[place : place + 1] == [scored]:
            return
        self.found.insert(place, scored)
        wanted = far_apart(self.found, self.count, self.distance)
        if len(wanted) == self.count:
            self.cutoff, self.is_full = wanted[-1][1], True
            self.lowest_cutoff = min(self.lowest_cutoff, self.cutoff)
            if self.count == 1:
                self.found = wanted

    def cutoff_holds(self) -> bool:
        """Whether all nodes were pruned by a cutoff that still holds; else they have to be searched again."""
        holds = self.lowest_cutoff == self.cutoff
        self.lowest_cutoff = self.cutoff
        return holds


def _order(scored: Scored) -> tuple[Fraction, Choice]:
    """Best first, equals by their options."""
    choice, objective = scored
    return objective, choice


def far_apart(ordered: list[Scored], count: int, distance: int) -> list[Scored]:
    """Take each time the first that differs from all taken before in at least `distance` slots, `count` at most."""
    choices_NK = np.array([choice for choice, _ in ordered])
    left_N = np.ones(len(ordered), dtype=bool)
    taken: list[Scored] = []
    while left_N.any() and len(taken) < count:
        index = int(left_N.argmax())
        taken.append(ordered[index])
        left_N &= (choices_NK != choices_NK[index]).sum(axis=1) >= distance
    return taken


def local_search(scaled: Scaled, reduced_KJ: Floats, start: Choice) -> Choice:
    """Change options two at a time, first until the choice is feasible, then to lower its score.

    Args:
        scaled: the problem.
        reduced_KJ: reduced costs, infinite for options that are not allowed.
        start: any choice.

    Returns:
        A choice that no pair of changes improves; it may still be infeasible.
    """
    num_options = reduced_KJ.shape[1]
    tried = np.argsort(reduced_KJ, axis=None, kind="stable")[: len(reduced_KJ) + NUM_CHANGES]
    slots_M, options_M = np.divmod(tried[np.isfinite(reduced_KJ.ravel()[tried])], num_options)
    same_slot_MM = slots_M[:, None] == slots_M
    np.fill_diagonal(same_slot_MM, False)  # a change paired with itself stands for that change alone
    alone_M = np.eye(len(slots_M), dtype=bool)
    choice_K = np.array(start)
    rows_K = np.arange(len(choice_K))
    for _ in range(MAX_ROUNDS):
        scores_K = scaled.scores_KJ[rows_K, choice_K]
        costs_KR = scaled.costs_KJR[rows_K, choice_K]
        over_R = costs_KR.sum(axis=0) - scaled.slacks_R
        score_M = scaled.scores_KJ[slots_M, options_M] - scores_K[slots_M]
        cost_MR = scaled.costs_KJR[slots_M, options_M] - costs_KR[slots_M]
        value_MM = score_M[:, None] + np.where(alone_M, 0.0, score_M)
        for over, cost_M in zip(over_R, cost_MR.T, strict=True):
            value_MM += EXCESS_PRICE * np.maximum(0.0, over + cost_M[:, None] + np.where(alone_M, 0.0, cost_M))
        value_MM[same_slot_MM] = np.inf
        first, second = np.unravel_index(value_MM.argmin(), value_MM.shape)
        now = EXCESS_PRICE * np.maximum(0.0, over_R).sum()
        if not value_MM[first, second] < now - 1e-12:
            break
        choice_K[slots_M[[first, second]]] = options_M[[first, second]]
    return tuple(choice_K.tolist())
