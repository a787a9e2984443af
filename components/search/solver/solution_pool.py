"""Several good choices: the best, then each time the best of those that differ from all before."""

import math
import time

from components.search.solver.branch_and_bound import search
from components.search.solver.incumbents import far_apart
from components.search.solver.problem import Problem
from components.search.solver.solve import Solution, solutions_of

CLOSE = 2
"""Up to this distance one search collects all choices that may be wanted; beyond, they would be too many."""


def pool(problem: Problem, count: int, *, distance: int = 1, time_limit_s: float = math.inf) -> list[Solution]:
    """The best choices, best first.

    Args:
        problem: options and limits.
        count: how many; fewer come back where there are no more, or time is over.
        distance: slots in which any two differ at least; 1 gives the `count` best.
        time_limit_s: for all of them.

    Raises:
        TimeIsOver: not even one was found.

    Source: arXiv 2411.19146, appendix B (there at most a share alpha of the layers may agree).
    """
    deadline = time.monotonic() + time_limit_s
    rough = _one_by_one(problem, count, distance, deadline, None if distance > CLOSE else 1)
    if distance > CLOSE:
        return rough
    known = [solution.choice for solution in rough]
    time_left_s = deadline - time.monotonic()
    outcome = search(problem, known=known, count=count, distance=distance, time_limit_s=time_left_s)
    outcome.found = far_apart(outcome.found, count, distance)
    return solutions_of(outcome)


def _one_by_one(problem: Problem, count: int, distance: int, deadline: float, max_nodes: int | None) -> list[Solution]:
    """Each under a limit on what may agree with every earlier one; with few nodes good ones rather than the best."""
    found: list[Solution] = []
    while len(found) < count:
        outcome = search(problem, time_limit_s=deadline - time.monotonic(), max_nodes=max_nodes if found else None)
        if not outcome.found:
            if not found:
                return solutions_of(outcome)
            break
        found += solutions_of(outcome)
        problem = problem.with_no_good_cut(found[-1].choice, distance)
    return found
