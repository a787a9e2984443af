"""Why no choice fits: the smallest set of limits that cannot be met together, and how far each of them can be met."""

import itertools
import math
from fractions import Fraction

from components.search.branching import search
from components.search.problem import Problem


def find_conflict(problem: Problem, *, time_limit_s: float = math.inf) -> dict[str, float]:
    """The smallest set of limits that no choice meets together.

    Sets are tried by size, so that none that is smaller clashes; of equals the first in the order of the limits.

    Args:
        problem: one that no choice fits.
        time_limit_s: for each set of limits; where it does not suffice, a set may be passed over.

    Returns:
        For each limit of the set the least that its cost can come to while the others of the set are met.
    """
    for size in range(1, len(problem.names) + 1):
        for names in itertools.combinations(problem.names, size):
            first = _least(problem, names[0], names, time_limit_s)
            if first is None or first > problem.rooms[problem.names.index(names[0])]:
                values = {name: _least(problem, name, names, time_limit_s) for name in names}
                fixed = dict(zip(problem.names, problem.fixed, strict=True))
                return {name: float(value + fixed[name]) for name, value in values.items() if value is not None}
    return {}


def _least(problem: Problem, name: str, names: tuple[str, ...], time_limit_s: float) -> Fraction | None:
    """The least sum of one cost over the slots while the others of a set are met; None if they clash."""
    index = problem.names.index(name)
    others = problem.only([other for other in names if other != name]).with_scores(problem.costs_KJR[:, :, index])
    outcome = search(others, time_limit_s=time_limit_s)
    return outcome.found[0][1] if outcome.found else None
