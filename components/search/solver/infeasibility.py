"""Infeasibility: the smallest set of limits that cannot be met together, and how far each of them can be met."""

import itertools

from components.search.solver.branch_and_bound import Outcome, search
from components.search.solver.problem import Problem

TIME_LIMIT_S = 20.0
"""Seconds for each question whether some limits can be met together."""


def find_conflict(problem: Problem, *, time_limit_s: float = TIME_LIMIT_S) -> dict[str, float]:
    """The smallest set of limits that no choice meets together.

    Sets are tried by size; of sets of one size the first in the order of the limits counts.

    Args:
        problem: an infeasible one.
        time_limit_s: for each set of limits; a set that is not decided in time is skipped.

    Returns:
        For each limit of the set the lowest cost that was reached while the others of the set are met; empty if no
        set was decided in time.
    """
    for size in range(1, len(problem.names) + 1):
        for names in itertools.combinations(problem.names, size):
            first = _least(problem, names[0], names, time_limit_s)
            if first.bound > problem.slacks[problem.names.index(names[0])]:
                outcomes = {name: _least(problem, name, names, time_limit_s) for name in names}
                fixed = dict(zip(problem.names, problem.fixed, strict=True))
                return {name: float(it.found[0][1] + fixed[name]) for name, it in outcomes.items() if it.found}
    return {}


def _least(problem: Problem, name: str, names: tuple[str, ...], time_limit_s: float) -> Outcome:
    """The lowest sum of one cost over the slots while the others of a set are met."""
    index = problem.names.index(name)
    others = problem.only([other for other in names if other != name]).with_scores(problem.costs_KJR[:, :, index])
    return search(others, time_limit_s=time_limit_s)
