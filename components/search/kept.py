"""The choices that a search keeps, and how good a choice must be to matter.

Wanted are `count` choices, each the best of those that differ from all before in at least `distance` slots. What is
known says how good the last of them is, until a choice turns up that is too close to some of those: then the goal moves
away, and nodes that were closed before may hold choices that are wanted after all. `settled` tells.
"""

import bisect
from fractions import Fraction

import numpy as np

from components.search.problem import Choice

Scored = tuple[Choice, Fraction]
"""A choice and its exact score."""


class Kept:
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
        self.goal, self.enough = ceiling, False
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
            self.goal, self.enough = wanted[-1][1], True
            self.closed_at = min(self.closed_at, self.goal)
            if self.count == 1:
                self.found = wanted

    def settled(self) -> bool:
        """Whether all nodes were closed by a goal that still holds; else they have to be opened again."""
        settled = self.closed_at == self.goal
        self.closed_at = self.goal
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
