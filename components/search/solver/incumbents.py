"""Incumbents: the choices within the limits that are known so far, and a local search that finds better ones.

Wanted are `count` choices, each the best of those that differ from all before in at least `distance` slots. The worst
of them is the cutoff. It can rise again when a diverse solution replaces near duplicates, so that closed nodes may
have to be opened again; `settled` tells.

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
"""What exceeding limits counts beside scores, both scaled to 1."""
MAX_ROUNDS = 60
"""Pairs of changes at most."""


Scored = tuple[Choice, Fraction]
"""A choice and its exact score."""


class IncumbentPool:
    """Choices within the limits that are known so far.

    Attributes:
        goal: choices that score so much or more do not matter.
        enough: whether the goal comes from choices that are known.
        found: these, best first.
        closed_at: the closest that the goal has been.
    """

    def __init__(self, count: int, distance: int, ceiling: Fraction) -> None:
        """Begin with none.

        Args:
            count: how many are wanted.
            distance: slots in which they differ at least.
            ceiling: more than any choice scores.
        """
        self.count, self.distance = count, distance
        self.cutoff, self.enough = ceiling, False
        self.closed_at = ceiling
        self.found: list[Scored] = []

    def offer(self, choice: Choice, objective: Fraction) -> None:
        """Take a choice that scores less than the goal."""
        scored = choice, objective
        place = bisect.bisect_left(self.found, _order(scored), key=_order)
        if self.found[place : place + 1] == [scored]:
            return
        self.found.insert(place, scored)
        wanted = far_apart(self.found, self.count, self.distance)
        if len(wanted) == self.count:
            self.cutoff, self.enough = wanted[-1][1], True
            self.closed_at = min(self.closed_at, self.cutoff)
            if self.count == 1:
                self.found = wanted

    def settled(self) -> bool:
        """Whether all nodes were closed by a goal that still holds; else they have to be opened again."""
        settled = self.closed_at == self.cutoff
        self.closed_at = self.cutoff
        return settled


def _order(scored: Scored) -> tuple[Fraction, Choice]:
    """Best first, equals by their options."""
    choice, objective = scored
    return objective, choice


def far_apart(ordered: list[Scored], count: int, distance: int) -> list[Scored]:
    """Each time the first that differs from all before in at least `distance` slots, `count` at most."""
    choices_NK = np.array([choice for choice, _ in ordered])
    left_N = np.ones(len(ordered), dtype=bool)
    taken: list[Scored] = []
    while left_N.any() and len(taken) < count:
        index = int(left_N.argmax())
        taken.append(ordered[index])
        left_N &= (choices_NK != choices_NK[index]).sum(axis=1) >= distance
    return taken


def improve(scaled: Scaled, reduced_KJ: Floats, start: Choice) -> Choice:
    """Change options two at a time, first until the limits hold, then to score less.

    Args:
        scaled: the problem.
        reduced_KJ: reduced costs, infinite where an option is not allowed.
        start: any choice.

    Returns:
        A choice that no such pair improves; it may still exceed limits.
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
